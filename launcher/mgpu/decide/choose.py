"""The decision: of all placements, the one the rules pick. A refusal and a misfit are plans too, with `refusal` set."""

from __future__ import annotations

from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide import rules
from mgpu.decide.compose import compose
from mgpu.decide.consider import consider
from mgpu.decide.misfit import explain_misfit, largest_ctx
from mgpu.decide.options import Case, Options, fewest, on_gpus, split_over, weigh_options
from mgpu.decide.place import as_pinned, by_room, fastest_first, on_host
from mgpu.decide.speed import host_seconds_per_token
from mgpu.decide.weigh import Weighed, weigh
from mgpu.errors import DoesNotFitError, RefusedError, UsageError
from mgpu.plan import Plan, Refusal
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.units import gib


def choose(request: Request, rig: Rig, job: Job) -> Plan:
    """The plan for `job` on `rig`. Raises `UsageError` for cards that do not exist or a mode the runtime has not."""
    case = Case(request=request, rig=rig, job=job, gpus=consider(request, rig))
    _check_split(case)
    if request.ctx == "max":
        case = case.with_job(_at_largest_ctx(case))
    if case.gpus and _all_pinned(case):
        return _by_hand(case)
    options = weigh_options(case)
    if request.split == "pipeline":
        return _split_by_request(case, options)
    chosen = options.single or options.split or _helped_by_cpu(case, options)
    return _settle(case, chosen, options) if chosen is not None else _misfit(case, options)


def _all_pinned(case: Case) -> bool:
    """Whether flags after `--` leave nothing to choose: proportions for each card, or no layer on any."""
    pinned = case.job.pinned
    return pinned.tensor_split is not None or (pinned.host_layers or 0) >= case.job.n_units


def _by_hand(case: Case) -> Plan:
    if case.job.pinned.tensor_split is None:
        return _settle(case, weigh(case.job, on_host(case.job), (), case.rig), Options())
    layout, used = as_pinned(case.job, case.gpus)
    return _settle(case, weigh(case.job, layout, used, case.rig), Options())


def room_for_ctx(request: Request, rig: Rig, job: Job, plan: Plan) -> int | None:
    """The largest context per user that the plan's own cards would hold, the trained context at most."""
    if plan.refusal is not None or plan.placement not in {"single", "pipeline"} or job.pinned.tensor_split:
        return None
    chosen = set(plan.layout.gpus)
    gpus = tuple(gpu for gpu in consider(request, rig) if gpu.index in chosen)
    case = Case(request=request, rig=rig, job=job, gpus=gpus)
    return largest_ctx(job, lambda other: on_gpus(case.with_job(other)) is not None, at_most=job.ctx_train)


def _check_split(case: Case) -> None:
    if case.request.split == "tensor":
        raise UsageError(
            f"--split tensor is not something this version plans for {case.job.runtime}",
            hint="use --split pipeline, or leave --split out",
        )
    if case.job.pinned.tensor_split is not None and case.one_card_only:
        raise UsageError(
            "--split none uses one card, --tensor-split after `--` several", hint="leave one of the two out"
        )
    if case.request.split == "pipeline" and len(case.gpus) < 2:
        raise UsageError(
            f"--split pipeline needs two GPUs, and there is {len(case.gpus)} to consider",
            hint="`mgpu rig show` lists the GPUs; --gpus says which to consider",
        )


def _at_largest_ctx(case: Case) -> Job:
    """`--ctx max`: the largest context for the cards that the model needs anyway; more cards are no reason to split.

    Where the cards do not hold the usual context, the largest that they hold; where they hold none, the usual one is
    left to the CPU's help. Without cards, RAM is the bound.
    """
    usual = case.job.at_ctx(min(case.job.ctx_train, case.job.ctx))
    best = on_gpus(case.with_job(usual))
    cards = case if best is None else replace(case, gpus=best.gpus)

    def holds(job: Job) -> bool:
        if case.gpus:
            return on_gpus(cards.with_job(job)) is not None
        return weigh(job, on_host(job), (), case.rig).fits

    lacking = case.gpus and best is None
    ctx = largest_ctx(usual, holds, at_most=usual.ctx if lacking else usual.ctx_train)
    return usual if ctx is None else usual.at_ctx(ctx)


def _split_by_request(case: Case, options: Options) -> Plan:
    """`--split pipeline`: refused where one card would do, unless forced. All of `--gpus` are used where given."""
    exact = split_over(case, len(case.gpus)) if case.request.gpus else None
    split = exact or options.split or fewest(case)
    if split is None:
        helped = _helped_by_cpu(case, options) if case.request.offload == "allow" else None
        return _settle(case, helped, options) if helped is not None else _misfit(case, options)
    if options.single is None or case.request.force:
        return _settle(case, split, options)
    verdict = rules.fits_one_card(split, options.singles, options.single, None)
    refusal = Refusal(
        code=RefusedError.code,
        exit_code=RefusedError.exit_code,
        message=f"refused by rule fits-one-card: {verdict.text}",
        hint="leave --split out to run it on one card, or add --force to split it all the same",
    )
    return compose(case, split, options, refusal)


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
        return candidate.speed.expected >= rules.MIN_TOK_S
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
    ordered = fastest_first(case.gpus)
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
    return compose(case, closest, options, _does_not_fit(message, hint))


def _does_not_fit(message: str, hint: str) -> Refusal:
    return Refusal(code=DoesNotFitError.code, exit_code=DoesNotFitError.exit_code, message=message, hint=hint)
