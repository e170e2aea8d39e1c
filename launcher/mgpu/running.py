"""One `mgpu run`, from its decision to its end: decided while nobody else decides, launched, looked after.

Where memory runs out, it is decided anew with what was learnt, once or twice; where it dies, it is started again if
that was asked for. However it ends, nothing of it is left, but for the record of how a detached one failed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

from msgspec import Struct
from msgspec.structs import replace

from mgpu import __version__, commands
from mgpu.commands import Decided
from mgpu.decide.claims import Claim, card_key
from mgpu.decide.learnt import merged
from mgpu.decide.restarts import LONG_S, MOST, Restarts
from mgpu.errors import DoesNotFitError, InterruptedLaunchError, MgpuError, OutOfMemoryError, RuntimeFailedError
from mgpu.launch.detached import Tether
from mgpu.launch.foreground import launch_plan
from mgpu.launch.heal import heal
from mgpu.launch.keeper import Keeper, Kept, planned_cards
from mgpu.launch.logs import new_log
from mgpu.launch.notify import VARIABLE as NOTIFY
from mgpu.launch.notify import notify
from mgpu.launch.progress import say
from mgpu.launch.records import End, Record
from mgpu.launch.signals import StopSignals, raising
from mgpu.launch.store import Entry, enter, name_for, planning
from mgpu.launch.verify import Launched
from mgpu.plan import Plan
from mgpu.remade import difference, learnt_from, remade
from mgpu.request import Request

_REMADE: Final = 2  # plans after the first one, when memory runs out


class Wish(Struct, frozen=True, kw_only=True):
    """What was asked of `run`. `restarts`: after a failure, again; `tether`: of one that outlives its terminal."""

    argument: str
    request: Request
    rig_name: str | None = None
    explicit: str | None = None
    prompt: str | None = None
    name: str | None = None
    restarts: bool = False
    tether: Tether | None = None


#: The decision for a wish, with these claims on the machine's memory beside those of other launches.
Decide = Callable[[Wish, tuple[Claim, ...]], Decided]


def run(wish: Wish, *, decide: Decide | None = None) -> None:
    """Decide, explain, launch, stay. Returns only after a prompt was answered; raises `MgpuError` for any other end.

    `decide` takes the place of the usual decision.
    """
    decide = decide or _decide
    gc.enable()  # from here on we may live for weeks
    with raising():
        heal()
        with planning(_tell_of_waiting, on_stuck=_tell_of_stuck):
            decided = decide(wish, ())
            _explain(decided)
            commands.stop_if_refused(decided.plan)
            entry = enter(_record(decided, wish), exact=wish.name is not None)
        with entry, StopSignals() as stop:
            one = _Run(wish, decide, decided, entry, stop)
            try:
                one.go()
            except MgpuError:
                raise
            except Exception as bug:
                one.leave_word_of(bug)
                raise


class _Run:
    """The tries of one run. `ready_at`: when the present one was ready, by the monotonic clock.

    `learnt`: from being out of memory, which happened `short` times; for `remade` of them there was another plan.
    """

    def __init__(self, wish: Wish, decide: Decide, decided: Decided, entry: Entry, stop: StopSignals) -> None:
        self.wish = wish
        self.decide = decide
        self.decided = decided
        self.entry = entry
        self.stop = stop
        self.tether = wish.tether
        self.ready_at: float | None = None
        self.learnt: tuple[Claim, ...] = ()
        self.short = 0
        self.remade = 0
        self.restarts = Restarts()
        self.keeper: Keeper | None = None

    def go(self) -> None:
        while True:
            self.ready_at = None
            try:
                self._launch()
            except InterruptedLaunchError:
                raise
            except RuntimeFailedError as error:
                if not self._may_go_on(error):
                    self._end(error)
            except MgpuError as error:
                if not (self.entry.record.restarts and self._restart(error)):
                    self._end(error)
            else:
                return

    def leave_word_of(self, bug: Exception) -> None:
        """Of a bug of ours, where nobody sees its traceback."""
        if self.entry.record.detached and self.tether is None:
            message = f"a bug in mgpu: {type(bug).__name__}: {bug}"
            hint = f"please report it, with the end of {self.entry.record.own_log}"
            self._keep_end(End(exit_code=MgpuError.exit_code, message=message, hint=hint, at=time.time()))

    def _launch(self) -> None:
        self.decided = commands.with_real_key(self.decided)  # not before: what is refused makes no key
        decided, wish = self.decided, self.wish
        launched = _launched(decided)
        kept = Kept(
            plan=decided.plan,
            parts=tuple(replica.plan for replica in decided.replicas) or (decided.plan,),
            gpus=tuple(gpu for gpu in decided.facts.rig.gpus if gpu.index in decided.plan.layout.gpus),
            adapter=decided.facts.adapter,
            api_key=decided.request.api_key,
            ends_unwell=wish.restarts,
        )
        self.keeper = Keeper(self.entry, kept, sys.stderr, earlier=self.keeper)
        stays = _how_it_ends(self.entry.record) if wish.prompt is None else ""
        if decided.attachment is not None:
            self._attach(decided, self.keeper, stays)
        elif not decided.replicas:
            launch_plan(
                decided.command_at,
                launched,
                prompt=wish.prompt,
                keeper=self.keeper,
                stop=self.stop,
                stays=stays,
                on_ready=self._ready,
            )
        else:
            self._launch_copies(launched, self.keeper, stays)

    def _launch_copies(self, launched: Launched, keeper: Keeper, stays: str) -> None:
        from mgpu.launch.proxy import find_proxy
        from mgpu.launch.together import Copy, launch_copies

        copies = [
            Copy(launched=replace(launched, plan=replica.plan), command_for=replica.command)
            for replica in self.decided.replicas
        ]
        launch_copies(
            copies,
            find_proxy(os.environ),
            prompt=self.wish.prompt,
            keeper=keeper,
            stop=self.stop,
            stays=stays,
            on_ready=self._ready,
        )

    def _attach(self, decided: Decided, keeper: Keeper, stays: str) -> None:
        from mgpu.launch.attach import attach  # with hashlib: not for what is started

        attachment = decided.attachment
        assert attachment is not None  # noqa: S101 - the caller has looked

        def on_ready(seconds: float) -> None:
            say(sys.stderr, f"  ready after {seconds:.1f} s: {attachment.endpoint}   model {attachment.model_name}")
            if stays:
                say(sys.stderr, f"  {stays.replace('stops it', 'gives it back')}")
            keeper.attached(attachment)
            keeper.ready(attachment.endpoint, "")
            self._ready()

        keeper.attached(attachment)
        attach(
            attachment,
            prompt=self.wish.prompt,
            stop=self.stop,
            on_ready=on_ready,
            tend=lambda: keeper.tend((), self.stop),
        )

    def _ready(self) -> None:
        """It answers. Whoever waited for that may go."""
        self.ready_at = time.monotonic()
        notify("READY=1" if not self.entry.record.restarts else "READY=1\nSTATUS=ready again")
        tether, self.tether = self.tether, None
        if tether is not None:
            own = new_log(f"{self.entry.record.name}-mgpu", kept=self.entry.record.all_logs).path
            self.entry.change(own_log=str(own))
            tether.let_go(own)

    def _may_go_on(self, error: RuntimeFailedError) -> bool:
        """Plan anew or start again, if there is a reason to hope; the failure is told on the way."""
        if isinstance(error, OutOfMemoryError):
            self.short += 1
            self.learnt = merged(self.learnt, learnt_from(error, self.decided, self.short))
            if self.ready_at is None and self.remade < _REMADE and not self._is_forced():
                return self._remake(error)
        if not self.wish.restarts or self.wish.prompt is not None:
            return False
        if self.ready_at is None and not self.entry.record.restarts:
            return False  # it never was ready: whoever started it is still looking
        return self._restart(error)

    def _is_forced(self) -> bool:
        """Whether the plan was launched against all advice: then it is that one, or none."""
        if self.wish.request.force:
            say(sys.stderr, "  --force: not planned anew")
        return self.wish.request.force

    def _remake(self, error: OutOfMemoryError) -> bool:
        """Decide anew, with what has been learnt."""
        self.remade += 1
        say(sys.stderr, f"mgpu: {error.message}")
        try:
            self._again(f" (try {self.remade + 1} of {_REMADE + 1})")
        except InterruptedLaunchError:
            raise
        except MgpuError as refused:
            say(sys.stderr, f"  no other plan will do: {refused.message}")
            return False
        return True

    def _again(self, words: str) -> None:
        """Decide anew by what is free now, and say how that differs. Raises for a plan that is not to be launched."""
        old = self.decided.plan
        with planning(_tell_of_waiting, on_stuck=_tell_of_stuck, check=self.stop.check):
            self.entry.change(cards=(), promised_host=0)
            whole = self.decide(self.wish, self.learnt)
            other = remade(whole, old) if self.learnt else whole
            if other is None:
                commands.stop_if_refused(whole.plan)
                raise DoesNotFitError("the flags after `--` leave none", hint="leave them to mgpu")
            commands.stop_if_refused(other.plan)
            if not words:
                _refuse_cpu(other.plan, old, self.wish.request)
            self._take(other)
        differs = difference(self.decided.plan, old)
        if words or differs:
            say(sys.stderr, f"  planned anew{words}: {differs or 'as before'}")
            _explain(self.decided)

    def _restart(self, error: MgpuError) -> bool:
        """Start it again after a pause, however often that takes; False: it has failed too often."""
        lived = 0.0 if self.ready_at is None else time.monotonic() - self.ready_at
        if lived >= LONG_S:
            self.remade = self.short = 0
            self.learnt = () if not isinstance(error, OutOfMemoryError) else self.learnt
        failed: MgpuError = error
        report = self._report(error) if isinstance(error, RuntimeFailedError) else ""
        while (pause := self.restarts.failed(lived)) is not None:
            self._tell(failed, pause, report)
            self._pause(pause)
            try:
                self._again("")
            except InterruptedLaunchError:
                raise
            except MgpuError as refused:
                failed, lived, report = refused, 0.0, ""
            else:
                self.entry.change(restarts=self.entry.record.restarts + 1)
                return True
        say(sys.stderr, f"  it has failed {self.restarts.in_a_row} times in a row: not started again")
        return False

    def _tell(self, failed: MgpuError, pause: float, report: str) -> None:
        """What has happened, and what will: on a line each, with the time, as nobody may be looking."""
        say(sys.stderr, f"{time.strftime('%Y-%m-%d %H:%M:%S')} mgpu: {failed.message}")
        again = f"started again in {pause:.0f} s ({self.restarts.in_a_row} of {MOST} in a row)"
        say(sys.stderr, f"  {again}{f'   report: {report}' if report else ''}")
        notify(f"STATUS=failed, started again in {pause:.0f} s")
        self.entry.change(state="waiting", said=failed.message, cards=(), promised_host=0, runtimes=())

    def _take(self, decided: Decided) -> None:
        """From now on this is the plan."""
        self.decided = decided
        fresh = _record(decided, self.wish)
        self.entry.change(
            state="loading",
            cards=fresh.cards,
            promised_host=fresh.promised_host,
            placement=fresh.placement,
            ctx=fresh.ctx,
            log="",
            logs=(),
            ready=None,
        )

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.stop.wait(left)
            self.stop.check()

    def _end(self, error: MgpuError) -> NoReturn:
        """It is over. One that nobody watches leaves word of how."""
        report = self._report(error) if isinstance(error, RuntimeFailedError) else ""
        if self.entry.record.detached and self.tether is None:
            end = End(exit_code=error.exit_code, message=error.message, hint=error.hint, at=time.time(), report=report)
            self._keep_end(end)
        raise error

    def _keep_end(self, end: End) -> None:
        over = {"runtimes": (), "directories": (), "cards": (), "ports": (), "after": (), "undo": ()}
        self.entry.change(state="failed", end=end, **over)
        self.entry.close(keep=True)

    def _report(self, error: RuntimeFailedError) -> str:
        if error.report or (not self.entry.record.runtimes and self.decided.attachment is None):
            return error.report  # told already; or nothing has run, and there is nothing to tell
        from mgpu.launch.crash import keep_report

        said = [] if self.keeper is None else self.keeper.said
        error.report = keep_report(error, self.entry.record, _launched(self.decided), self.decided.command, said)
        return error.report


def _decide(wish: Wish, learnt: tuple[Claim, ...]) -> Decided:
    return commands.decide(
        wish.argument,
        wish.request,
        rig_name=wish.rig_name,
        launching=True,
        explicit=wish.explicit,
        claims=learnt,
    )


def _launched(decided: Decided) -> Launched:
    return Launched(
        adapter=decided.facts.adapter,
        installed=decided.facts.installed,
        rig=decided.facts.rig,
        model=decided.model,
        request=decided.request,
        plan=decided.plan,
    )


def _record(decided: Decided, wish: Wish) -> Record:
    plan, rig = decided.plan, decided.facts.rig
    keys = {gpu.index: card_key(gpu) for gpu in rig.gpus}
    name = wish.name or name_for(decided.model.name)
    return Record(
        mgpu=__version__,
        name=name,
        detached=wish.tether is not None,
        terminal=wish.tether is None and os.isatty(2),
        unit=wish.tether is None and bool(os.environ.get(NOTIFY)),
        model=decided.model.name,
        path=decided.model.path,
        runtime=plan.runtime,
        version=decided.facts.installed.version,
        placement=plan.placement,
        ctx=plan.ctx,
        users=plan.users,
        cards=planned_cards(plan, keys),
        promised_host=plan.host.memory.total,
        ram_planned=plan.host.memory.total,
        started=time.time(),
    )


def _how_it_ends(record: Record) -> str:
    return f"`mgpu stop {record.name}` stops it" if record.detached else "Ctrl-C stops it"


def _explain(decided: Decided) -> None:
    for line in commands.explain(decided):
        say(sys.stderr, line)


def _refuse_cpu(plan: Plan, old: Plan, request: Request) -> None:
    """What ran on cards is not quietly started on the CPU alone: a driver that is being upgraded comes back.

    Raises `DoesNotFitError`.
    """
    if old.devices and plan.placement == "cpu" and request.offload != "allow":
        raise DoesNotFitError(
            "the cards it ran on are gone or have no room, and the CPU alone would be many times slower",
            hint="--offload allow lets it run there all the same",
        )


def _tell_of_waiting() -> None:
    say(sys.stderr, "  another mgpu is just deciding: waiting for it")


def _tell_of_stuck(waited: str) -> None:
    say(sys.stderr, f"  note: {waited}: going on without it")
