"""The decision: of all placements, the one the rules pick. A refusal and a misfit are plans too, with `refusal` set."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide import rules
from mgpu.decide.case import Case, paces_of
from mgpu.decide.compose import compose
from mgpu.decide.consider import consider
from mgpu.decide.matched import matched_sets, slow_slots, why_unmatched
from mgpu.decide.misfit import explain_misfit, largest_ctx
from mgpu.decide.options import Options, gpus_hold, on_gpus, ranks, ranks_unasked, tensor, weigh_options
from mgpu.decide.place import as_pinned, by_room, on_each, on_host, roughly_hold
from mgpu.decide.speed import forecast, host_seconds_per_token
from mgpu.decide.splits import fewest, split_over
from mgpu.decide.weigh import Weighed, tok_s, total, weigh
from mgpu.errors import DoesNotFitError, RefusedError, UsageError
from mgpu.plan import Plan, Refusal, Speed
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import gib

#: Tensor ranks must be predicted this much faster than a pipeline to be chosen unasked; more, where the runtime itself
#: calls them experimental, and there only where the cards reach each other directly.
_TENSOR_MARGIN: Final = 1.05
_EXPERIMENTAL_MARGIN: Final = 1.25


def choose(request: Request, rig: Rig, job: Job, *, offering: bool = True) -> Plan:
    """The plan for `job` on `rig`. Raises `UsageError` for cards that do not exist or a mode the runtime has not.

    `offering`: where the cards do not hold it, look for what they would hold. It takes longer than all the rest.
    """
    case = replace(_case(request, rig, job, consider(request, rig)), offering=offering)
    _check_split(case)
    if request.ctx == "max":
        case = case.with_job(_at_largest_ctx(case))
    if case.gpus and _all_pinned(case):
        return _by_hand(case)
    options = weigh_options(case)
    if case.asked_mode is not None:
        return _split_by_request(case, options)
    chosen = _on_cards(case, options) or _helped_by_cpu(case, options)
    return _settle(case, chosen, options) if chosen is not None else _misfit(case, options)


def room_for_ctx(request: Request, rig: Rig, job: Job, plan: Plan) -> int | None:
    """The largest context per user that the plan's own cards would hold, the trained context at most."""
    modes = {"single", "pipeline", "tensor", "replicas"}
    if plan.refusal is not None or plan.placement not in modes or job.pinned.tensor_split:
        return None
    case = _case(request, rig, job, _cards_of_plan(plan, consider(request, rig)))
    if plan.placement in {"single", "pipeline"}:
        return largest_ctx(job, lambda other: gpus_hold(case.with_job(other)), at_most=job.ctx_train)
    layout, gpus = plan.layout, case.gpus
    return largest_ctx(job, lambda other: weigh(other, layout, gpus, rig).fits, at_most=job.ctx_train)


def speed_by_room(job: Job, indices: tuple[int, ...], rig: Rig) -> Speed | None:
    """What it would run at with layers on these cards in proportion to their free memory, as runtimes do it unasked.

    None where they cannot hold it: the CPU would have to help.
    """
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    gpus = tuple(by_index[index] for index in indices)
    if not roughly_hold(job, gpus):
        return None
    return forecast(job, by_room(job, gpus), gpus, rig).tok_s


def _case(request: Request, rig: Rig, job: Job, gpus: tuple[Gpu, ...]) -> Case:
    return Case(request=request, rig=rig, job=job, gpus=gpus, paces=paces_of(job, gpus, rig))


def _cards_of_plan(plan: Plan, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    by_index = {gpu.index: gpu for gpu in gpus}
    return tuple(by_index[index] for index in plan.layout.gpus)


def _on_cards(case: Case, options: Options) -> Weighed | None:
    """Of the placements without the CPU, the one the rules pick."""
    if options.single is not None or options.replicas is not None:
        return _one_card_or_replicas(options)
    split = options.split
    if split is not None and options.balanced is not None and case.wants_balance:
        split = options.balanced
    ranked = options.tensor if options.tensor is not None and ranks_unasked(case, options.tensor) else None
    if ranked is None or split is None:
        return split or ranked
    margin = _EXPERIMENTAL_MARGIN if case.job.tensor_is_experimental else _TENSOR_MARGIN
    return ranked if total(ranked) >= margin * total(split) else split


def _one_card_or_replicas(options: Options) -> Weighed | None:
    single, copies = options.single, options.replicas
    if single is None or copies is None:
        return single or copies
    return copies if total(copies) > total(single) else single


def _all_pinned(case: Case) -> bool:
    """Whether flags after `--` leave nothing to choose: proportions for each card, or no layer on any."""
    pinned = case.job.pinned
    return pinned.tensor_split is not None or (pinned.host_layers or 0) >= case.job.n_units


def _by_hand(case: Case) -> Plan:
    if case.job.pinned.tensor_split is None:
        return _settle(case, weigh(case.job, on_host(case.job), (), case.rig), Options())
    layout, used = as_pinned(case.job, case.gpus)
    if case.asked_mode == "tensor":
        layout = on_each(case.job, used, "tensor")
    return _settle(case, weigh(case.job, layout, used, case.rig), Options())


def _check_split(case: Case) -> None:
    asked = case.asked_mode
    if case.job.pinned.tensor_split is not None and case.one_card_only:
        raise UsageError(
            "--split none uses one card, --tensor-split after `--` several", hint="leave one of the two out"
        )
    if asked is not None and len(case.gpus) < 2:
        raise UsageError(
            f"--split {asked} needs two GPUs, and there {'is one' if case.gpus else 'are none'} to consider",
            hint="`mgpu rig show` lists the GPUs; --gpus says which to consider",
        )
    if asked == "tensor":
        reason = case.job.why_not_tensor(case.gpus)
        if reason is not None and all(case.job.why_not_tensor(cards) for cards in _tensor_sets(case)):
            raise UsageError(
                f"--split tensor: {case.job.runtime} cannot run this so: {reason}",
                hint="use --split pipeline, or leave --split out",
            )


def _at_largest_ctx(case: Case) -> Job:
    """`--ctx max`: the largest context for the cards that the model needs anyway; more cards are no reason to split.

    Replicas stay replicas. Where the cards do not hold the usual context, the largest that they hold; where they hold
    none, the usual one is left to the CPU's help. Without cards, RAM is the bound.
    """
    usual = case.job.at_ctx(min(case.job.ctx_train, case.job.ctx))
    with_usual = case.with_job(usual)
    best = _on_cards(with_usual, weigh_options(with_usual)) if case.asked_mode is None else on_gpus(with_usual)
    cards = case if best is None else replace(case, gpus=best.gpus)

    def holds(job: Job) -> bool:
        if best is not None and best.kind == "replicas" and case.asked_mode is None:
            return weigh(job, best.layout, best.gpus, case.rig).fits
        if case.gpus:
            return gpus_hold(cards.with_job(job))
        return weigh(job, on_host(job), (), case.rig).fits

    lacking = case.gpus and best is None
    ctx = largest_ctx(usual, holds, at_most=usual.ctx if lacking else usual.ctx_train)
    return usual if ctx is None else usual.at_ctx(ctx)


def _split_by_request(case: Case, options: Options) -> Plan:
    """`--split pipeline` or `tensor`: refused where one card would do, unless forced, or demanded after `--`."""
    as_ranks = case.asked_mode == "tensor"
    split = _ranks_by_request(case) if as_ranks else _pipeline_by_request(case, options)
    if split is None or not (split.fits or as_ranks):
        helped = _helped_by_cpu(case, options) if case.request.offload == "allow" else None
        return _settle(case, helped, options) if helped is not None else _misfit(case, options)
    why = _why_refused(case, split, options)
    if why is None or case.request.force or case.job.pinned.mode == "tensor":
        return _settle(case, split, options)
    rule, text, hint = why
    refusal = Refusal(
        code=RefusedError.code,
        exit_code=RefusedError.exit_code,
        message=f"refused by rule {rule}: {text}",
        hint=f"{hint}, or add --force to split it all the same",
        rule=rule,
    )
    return compose(case, split, options, refusal)


def _pipeline_by_request(case: Case, options: Options) -> Weighed | None:
    """All of `--gpus` are used where given; else the fewest that hold it."""
    exact = split_over(case, len(case.gpus)) if case.request.gpus else None
    return exact or options.split or fewest(case)


def _ranks_by_request(case: Case) -> Weighed | None:
    """All of `--gpus` where given; else what the rules would pick; else the best set of matched cards, or of any."""
    picked = None if case.request.gpus else tensor(case)
    if picked is not None:
        return picked
    weighed = [found for cards in _tensor_sets(case) if (found := ranks(case, cards)) is not None]
    return max(weighed, key=lambda one: (one.fits, why_unmatched(one.gpus) is None, total(one)), default=None)


def _tensor_sets(case: Case) -> list[tuple[Gpu, ...]]:
    if case.request.gpus:
        return [case.gpus]
    ordered = case.ordered
    return [*matched_sets(case.gpus, case.rig, paying=False), *(ordered[:n] for n in range(2, len(ordered) + 1))]


def _why_refused(case: Case, split: Weighed, options: Options) -> tuple[str, str, str] | None:
    """(rule, its figures, what to do) where a rule is against the split that was asked for."""
    if options.single is not None:
        said = rules.verdicts(rules.Ruling(case=case, chosen=split, options=options))[0]
        return said.id, said.text, "leave --split out to run it on one card"
    if split.kind != "tensor":
        return None
    unmatched, slow = why_unmatched(split.gpus), slow_slots(split.gpus)
    if unmatched is not None:
        return "mixed-is-pipeline", f"tensor ranks on {unmatched}", "use --split pipeline"
    if slow:
        where = f"{rules.label(slow[0])} is in a PCIe {slow[0].pcie} slot"
        return "slow-slot", f"{where}: tensor ranks would wait for it in every layer", "use --split pipeline"
    return None


def _helped_by_cpu(case: Case, options: Options) -> Weighed | None:
    """The CPU's help, where it is allowed and usable: rule `cpu-offload-last`."""
    candidate = options.with_cpu
    if candidate is None or not candidate.fits:
        return None
    by_hand = case.job.pinned.host_experts is not None
    if case.request.offload == "never" and case.gpus:
        return candidate if by_hand and not candidate.layout.shape.host_layers else None
    if case.request.offload == "allow" or by_hand:
        return candidate
    return candidate if _is_usable(case, candidate) else None


def _is_usable(case: Case, candidate: Weighed) -> bool:
    """Fast enough to be started unasked. Where a card's speed is unknown, the CPU's share alone bounds it."""
    if candidate.speed is not None:
        return tok_s(candidate) >= rules.MIN_TOK_S
    seconds = host_seconds_per_token(case.job, candidate.layout, case.rig.ram_bandwidth_bytes_per_s)
    return seconds * rules.MIN_TOK_S <= 1


def _settle(case: Case, chosen: Weighed, options: Options) -> Plan:
    """The chosen placement as a plan; one that the person's own flags demand may still lack room."""
    if chosen.fits or case.request.force:
        return compose(case, chosen, options, None)
    worst = max(range(len(chosen.short)), key=lambda i: chosen.short[i], default=None)
    if worst is not None and chosen.short[worst]:
        lacks = f"{rules.label(chosen.gpus[worst])} is short by {gib(chosen.short[worst])}"
    else:
        lacks = f"RAM is short by {gib(chosen.host_short)}"
    refusal = _does_not_fit(
        f"the layout asked for does not fit: {lacks}",
        "leave the split to mgpu, give this card less, or add --force to try it all the same",
    )
    return compose(case, chosen, options, refusal)


def _misfit(case: Case, options: Options) -> Plan:
    ordered = case.ordered
    if case.one_card_only:
        ordered = options.singles[0].gpus if options.singles else ()
    closest = weigh(case.job, by_room(case.job, ordered), ordered, case.rig) if ordered else None
    if closest is None or closest.fits:
        closest = options.cpu or next(iter(options.singles), closest)
    if closest is None:
        raise UsageError("there is nothing to place the model on", hint="`mgpu rig show` lists the GPUs")
    if case.request.force:
        return compose(case, closest, options, None)
    message, hint = explain_misfit(case, closest, options.with_cpu)
    slow = options.with_cpu is not None and options.with_cpu.fits
    refusal = _does_not_fit(message, hint, rule="cpu-offload-last" if slow else None)
    return compose(case, closest, options, refusal)


def _does_not_fit(message: str, hint: str, *, rule: str | None = None) -> Refusal:
    code, exit_code = DoesNotFitError.code, DoesNotFitError.exit_code
    return Refusal(code=code, exit_code=exit_code, message=message, hint=hint, rule=rule)
