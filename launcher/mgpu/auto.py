"""`--runtime auto`: which runtimes are here, what each would do with the model, and the facts of the one to use.

Another runtime is looked for only where that could change the answer: of two that read GGUF with the same kernels the
first will do, unless it is not here or leaves cards idle that the other may use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Adapter
from mgpu.decide.abilities import only_usable
from mgpu.decide.claims import Claim
from mgpu.decide.runtime import Candidate, advice, best, told
from mgpu.errors import MgpuError, RuntimeMissingError, UsageError
from mgpu.gather import Facts, find_installed, gather
from mgpu.model import Model
from mgpu.plan import Plan
from mgpu.request import Request, RuntimeName
from mgpu_adapters.registry import load_adapter, names_for, pick_adapter


class Asking(Struct, frozen=True, kw_only=True):
    """What `gather` is asked beside the adapter."""

    rig_name: str | None
    launching: bool
    explicit: str | None
    environ: Mapping[str, str]
    claims: tuple[Claim, ...] = ()

    @property
    def hypothetical(self) -> bool:
        """Whether nothing of this machine counts: every runtime is taken to be installed."""
        return self.rig_name is not None and not self.launching

    def facts(self, adapter: Adapter) -> Facts:
        return gather(
            adapter,
            rig_name=self.rig_name,
            launching=self.launching,
            explicit=self.explicit,
            environ=self.environ,
            claims=self.claims,
        )


class Picked(Struct, frozen=True, kw_only=True):
    """The facts to decide by. `candidates`: all that were weighed; empty where there was no choice."""

    facts: Facts
    candidates: tuple[Candidate, ...] = ()

    def tell(self, plan: Plan) -> Plan:
        """`plan`, made from `facts`, with why it was this runtime."""
        return told(plan, self.candidates) if self.candidates else plan


class _Weighed(Struct, frozen=True, kw_only=True):
    candidate: Candidate
    facts: Facts | None
    error: MgpuError | None = None


def pick(model: Model, request: Request, asking: Asking) -> Picked:
    """The runtime for `model`: the one asked for, or by rule `runtime-choice`.

    Raises as `gather` does, and `UsageError` for a llama-server where llama.cpp is not in play.
    """
    adapter = pick_adapter(request, model)
    if asking.explicit is not None and adapter.name != "llama.cpp":
        raise UsageError(
            f"--llama-server is for llama.cpp, and {model.path} is for {adapter.name}", hint="leave --llama-server out"
        )
    names = names_for(model.format)
    if request.runtime != "auto" or len(names) == 1 or asking.explicit is not None:
        return Picked(facts=asking.facts(adapter))
    if model.format != "gguf":
        return _by_plan(model, request, names, asking)
    if asking.hypothetical:
        return Picked(facts=asking.facts(adapter))
    facts = _facts_if_here(adapter, asking)
    if facts is not None and all(gpu.enabled or gpu.integrated for gpu in facts.rig.gpus):
        return Picked(facts=facts)
    if not any(_is_here(name, asking) for name in names[1:]):
        return Picked(facts=facts or asking.facts(adapter))
    return _by_plan(model, request, names, asking)


def _facts_if_here(adapter: Adapter, asking: Asking) -> Facts | None:
    from mgpu.launch.find import find_runtime

    found = find_runtime(adapter.search, explicit=None, environ=asking.environ)
    return None if found is None else asking.facts(adapter)


def _is_here(name: RuntimeName, asking: Asking) -> bool:
    """Whether it could be used: one that is broken or too old is not worth a word where another will do."""
    try:
        return find_installed(load_adapter(name), None, asking.environ) is not None
    except MgpuError:
        return False


def _by_plan(model: Model, request: Request, names: Sequence[RuntimeName], asking: Asking) -> Picked:
    """The best predicted plan among the runtimes that are here; where none is, the best there could be, unlaunched."""
    weighed = [_weigh(name, model, request, asking) for name in names]
    candidates = tuple(one.candidate for one in weighed)
    here = [candidate for candidate in candidates if candidate.installed]
    if not here and asking.launching:
        return Picked(facts=asking.facts(load_adapter(names[0])))  # raises, with how to install it
    chosen = best(here or candidates)
    facts = next((one.facts for one in weighed if one.candidate is chosen), None)
    if chosen is None or chosen.plan is None or facts is None:
        raise next(one.error for one in weighed if one.error is not None)
    hint = advice(chosen.plan, candidates)
    return Picked(
        facts=facts if hint is None else replace(facts, notes=(*facts.notes, hint)),
        candidates=candidates,
    )


def _weigh(name: RuntimeName, model: Model, request: Request, asking: Asking) -> _Weighed:
    """What the runtime would do; without it here, what it could."""
    adapter = load_adapter(name)
    install, installed = adapter.search.install, False
    try:
        installed = asking.hypothetical or find_installed(adapter, None, asking.environ) is not None
        facts = (asking if installed else replace(asking, launching=False)).facts(adapter)
        if asking.hypothetical or not installed:
            facts = replace(facts, rig=only_usable(adapter, facts.rig))
        plan = _plan(model, request, facts)
    except MgpuError as error:  # it is out of the choice, and why is told
        reason = Candidate(runtime=name, installed=installed, install=install, why_not=error.message)
        return _Weighed(candidate=reason, facts=None, error=error)
    return _Weighed(candidate=Candidate(runtime=name, installed=installed, install=install, plan=plan), facts=facts)


def _plan(model: Model, request: Request, facts: Facts) -> Plan:
    """Raises `RuntimeMissingError` where no card is left that the runtime must have."""
    from mgpu.decide.choose import choose
    from mgpu.decide.consider import with_reserves

    job = facts.adapter.job(model, request, facts.installed)
    if not job.computes_on_cpu and not any(gpu.enabled for gpu in facts.rig.gpus):
        reasons = (why for gpu in facts.rig.gpus if (why := facts.adapter.why_not_gpu(gpu)) is not None)
        why = next(reasons, "it needs a GPU")
        raise RuntimeMissingError(
            f"{facts.adapter.name} has no card to run on: {why}", hint="use llama.cpp with a GGUF of the model"
        )
    return choose(request, with_reserves(request, facts.rig), job)
