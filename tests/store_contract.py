"""What every store must do. For a store of your own::

    from store_contract import StoreContract

    class TestMine(StoreContract):
        @pytest.fixture
        def handles(self):
            return lambda: MyStore(...)  # each call: a handle on the same empty store, as another process would have
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from clocks import FakeClock
from stores import Wrapped

from copilot_router import BreakerRecord, CircuitBreaker, CircuitOpen, ServerError

ODD_NAMES = [
    "a", "a ", "A", "a:b", "a/b", "a%3Ab", "{a}", "*", "'; DROP TABLE breakers; --", "\r\nFLUSHALL\r\n", "naïve",
    "nai\u0308ve", "中文🙂", "x" * 10_000, "x" * 10_001, "\x00", "breakers", "0", "None",
]  # fmt: skip
RECORDS = [
    BreakerRecord(),
    BreakerRecord(generation=7, era=3, failures=2),
    BreakerRecord("open", 2**53, 2**53, 3, 1795580430.392527, 15.25, 4, 0, 9, "ServerError: “quoted” 'and' \\ \n 🙂"),
    BreakerRecord("open", 5, 5, 0, math.inf, math.inf, 0, 0, 1, "opened by hand"),
    BreakerRecord("half_open", 6, 6, 3, 12.5, 120.0, 1, 2, 1, "x" * 300),
]
Handles = Callable[[], Any]


class StoreContract:
    """The tests; ``handles`` is the one thing to define."""

    @pytest.fixture
    def handles(self) -> Handles:
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @pytest.fixture
    def process(self, handles: Handles, clock: FakeClock) -> Callable[..., CircuitBreaker]:
        """A breaker as another process would have it, in the clock's time."""

        def make(name: str = "x", **settings: Any) -> CircuitBreaker:
            store = Wrapped(handles(), clock)
            store.shared_counts = store.shares_local_errors = True
            return CircuitBreaker(name=name, clock=clock, store=store, **settings)

        return make

    # -- the two methods

    def test_nothing_is_there_at_first(self, handles: Handles) -> None:
        """An unknown name: no record, and the time as a finite number that does not go back."""
        store = handles()
        record, now = store.load("unknown")
        again, later = handles().load("unknown")
        assert record is None
        assert again is None
        assert math.isfinite(now)
        assert now <= later

    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.state)
    def test_a_record_comes_back_as_it_was(self, handles: Handles, record: BreakerRecord) -> None:
        """Every field, infinity and odd text included, through another handle."""
        assert handles().swap("x", None, record) is True
        found = handles().load("x")[0]
        assert found == record
        assert [type(value) for value in found] == [type(value) for value in record]

    def test_101_only_the_expected_generation_is_replaced(self, handles: Handles) -> None:
        """101: another generation, a missing record expected, a present one not expected: refused, nothing changes."""
        one, two = handles(), handles()
        first, second = BreakerRecord(generation=10), BreakerRecord(generation=20)
        assert one.swap("x", 10, first) is False
        assert one.load("x")[0] is None
        assert one.swap("x", None, first) is True
        assert two.swap("x", None, second) is False
        assert two.swap("x", 9, second) is False
        assert one.load("x")[0] == first
        assert two.swap("x", 10, second) is True
        assert one.swap("x", 10, first) is False
        assert one.load("x")[0] == second

    def test_118_names_are_kept_apart(self, handles: Handles) -> None:
        """118: odd characters, ten thousand of them, look-alikes: each name has its own record."""
        store = handles()
        for at, name in enumerate(ODD_NAMES, 1):
            assert store.swap(name, None, BreakerRecord(generation=at, reason=name[:9]))
        for at, name in enumerate(ODD_NAMES, 1):
            assert store.load(name)[0] == BreakerRecord(generation=at, reason=name[:9])

    def test_one_of_many_wins_each_generation(self, handles: Handles) -> None:
        """Eight threads with handles of their own: every generation has exactly one writer."""
        won: list[int] = []
        barrier = threading.Barrier(8)

        def work() -> None:
            store = handles()
            barrier.wait(30)
            mine = 0
            while mine < 20:
                record = store.load("x")[0]
                at = 0 if record is None else record.generation
                try:
                    if store.swap("x", None if record is None else at, BreakerRecord(generation=at + 1)):
                        won.append(at + 1)
                        mine += 1
                except Exception as error:  # a store may say that it is too busy, as long as it wrote nothing
                    assert "locked" in str(error) or isinstance(error, TimeoutError)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(won) == list(range(1, 161))

    # -- breakers that share it

    def test_99_one_trips_and_the_other_refuses(self, process: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
        """99, 100: without a failure of its own, for the same time; and closes when the first has closed."""
        one, other = process(), process()
        assert other.is_closed
        for _ in range(3):
            one.admit().failure("down")
        clock.advance(2)
        with pytest.raises(CircuitOpen, match=r"x is open \(down\)") as refused:
            other.admit()
        assert refused.value.retry_after == pytest.approx(13)
        clock.advance(13)
        one.admit().success()
        clock.advance(1)
        assert other.is_closed
        assert one.is_closed
        other.admit().success()

    def test_117_failures_are_counted_together(self, process: Callable[..., CircuitBreaker]) -> None:
        """117, 104: each process is new, fails once, and resets nothing that was counted before."""
        for count in range(1, 6):
            breaker = process(failure_threshold=5)
            breaker.admit().failure()
            assert breaker.snapshot().failures == count
        with pytest.raises(CircuitOpen):
            process(failure_threshold=5).admit()

    def test_96_one_trial_for_all(self, process: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
        """96, 97: one trial whoever asks first; after its lease, one takes over; the late verdict changes nothing."""
        breakers = [process(trial_timeout=40) for _ in range(4)]
        for _ in range(3):
            breakers[0].admit().failure()
        clock.advance(1)
        assert all(breaker.is_open for breaker in breakers)
        clock.advance(14)
        held = self._only_one(breakers)
        clock.advance(39.5)
        assert self._granted(breakers) == []
        clock.advance(0.5)
        successor = self._only_one(breakers[::-1])
        clock.advance(1)
        held.success()
        assert all(breaker.is_half_open for breaker in breakers)
        successor.failure()
        clock.advance(1)
        assert all(breaker.is_open for breaker in breakers)
        held.success()
        assert all(breaker.is_open for breaker in breakers)

    @staticmethod
    def _granted(breakers: list[CircuitBreaker]) -> list[Any]:
        tickets = []
        for breaker in breakers:
            try:
                tickets.append(breaker.admit())
            except CircuitOpen:
                pass
        return tickets

    def _only_one(self, breakers: list[CircuitBreaker]) -> Any:
        (ticket,) = self._granted(breakers)
        assert ticket.is_trial
        return ticket

    def test_102_the_later_deadline_stays(self, process: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
        """102: parked by two processes at once: the later end, whoever was last; opened once."""
        changes: list[tuple[str, ...]] = []
        one, other = process(), process(on_change=lambda *change: changes.append(change))
        tickets = [one.admit(), other.admit(), one.admit()]
        tickets[0].park(10)
        tickets[1].park(60)
        clock.advance(1)
        tickets[2].park(5)
        assert one.retry_after == other.retry_after == pytest.approx(59)
        assert [change[1:3] for change in changes] == [("closed", "open")]
        assert other.snapshot().opened == 1

    def test_101_results_of_an_older_era_change_nothing(
        self, process: Callable[..., CircuitBreaker], clock: FakeClock
    ) -> None:
        """34 to 37, 101: admitted here while closed, opened and tried there: neither verdict counts any more."""
        one, other = process(), process()
        late, later = one.admit(), one.admit()
        for _ in range(3):
            other.admit().failure()
        clock.advance(15)
        trial = other.admit()
        late.failure()
        later.success()
        clock.advance(1)
        assert one.is_half_open
        trial.success()
        clock.advance(1)
        assert (one.state, one.snapshot().failures, one.snapshot().stale) == ("closed", 0, 2)

    def test_82_by_hand_and_for_all(self, process: Callable[..., CircuitBreaker], clock: FakeClock) -> None:
        """80, 82: opened until reset in one process, reset in another."""
        one, other = process(), process()
        assert other.is_closed
        one.open(reason="maintenance")
        clock.advance(1e6)
        assert other.is_open
        assert other.retry_after is None
        other.reset()
        clock.advance(1)
        assert one.is_closed

    def test_115_a_healthy_call_writes_nothing(self, handles: Handles, clock: FakeClock) -> None:
        """115: a thousand good calls: no write, and at most one read per refresh interval."""
        store = Wrapped(handles(), clock)
        breaker = CircuitBreaker(name="x", clock=clock, store=store)
        for _ in range(1000):
            breaker.call(int)
            breaker.admit().success()
            clock.advance(0.01)
        refresh = getattr(store, "refresh", 1.0)
        assert store.swaps == 0
        if refresh:
            assert 1 <= store.loads <= 10 / refresh + 1

    def test_118_breakers_of_odd_names(self, process: Callable[..., CircuitBreaker]) -> None:
        """118: a breaker's name is the record's; the neighbours stay closed."""
        for name in ODD_NAMES[::2]:
            process(name).open()
        assert [process(name).is_open for name in ODD_NAMES] == [at % 2 == 0 for at in range(len(ODD_NAMES))]

    def test_an_error_of_a_vendor_is_shared(self, process: Callable[..., CircuitBreaker]) -> None:
        """What a guarded call raises opens it for everybody."""

        def down() -> None:
            raise ServerError("down")

        one, other = process(failure_threshold=1), process(failure_threshold=1)
        with pytest.raises(ServerError):
            one.call(down)
        with pytest.raises(CircuitOpen):
            other.call(down)
