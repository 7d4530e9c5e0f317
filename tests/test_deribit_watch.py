"""When silence and lag are judged to be more than chance; and when reading rests. Pure."""

from collector.channels import parse_channel
from workers.deribit.connection.pace import Pace
from workers.deribit.feeds.rhythm import QUIET, SAMPLES, SECOND, Rhythm, is_never_quiet
from workers.deribit.watching.lag import LAGGING, LASTING, LagWatch


def come(rhythm: Rhythm, now: int) -> None:
    """Something comes."""
    rhythm.look(now, now)


def beat(rhythm: Rhythm, start: int, interval: int, count: int) -> int:
    """Something comes so often; return when it came last."""
    for number in range(count):
        come(rhythm, start + number * interval)
    return start + (count - 1) * interval


def test_a_steady_channel_that_falls_silent_is_out_of_its_rhythm() -> None:
    rhythm = Rhythm()
    last = beat(rhythm, SECOND, SECOND, SAMPLES + 1)
    assert not rhythm.is_broken(last + QUIET)
    assert rhythm.is_broken(last + 21 * SECOND)
    come(rhythm, last + 22 * SECOND)
    assert not rhythm.is_broken(last + 23 * SECOND)


def test_a_quiet_channel_is_held_to_its_own_rhythm() -> None:
    rhythm = Rhythm()
    last = beat(rhythm, SECOND, 60 * SECOND, SAMPLES + 1)
    assert not rhythm.is_broken(last + 19 * 60 * SECOND)
    assert rhythm.is_broken(last + 21 * 60 * SECOND)


def test_too_few_samples_say_nothing() -> None:
    rhythm = Rhythm()
    last = beat(rhythm, SECOND, SECOND, SAMPLES)
    assert not rhythm.is_broken(last + 10_000 * SECOND)


def test_but_what_is_never_quiet_is_given_a_minute_and_ever_more_if_that_led_to_nothing() -> None:
    rhythm, asked, minute = Rhythm(is_steady=True), 100 * SECOND, 60 * SECOND
    assert not rhythm.is_broken(asked)  # nobody has asked for it yet
    rhythm.restart(0, asked)
    assert not rhythm.is_broken(asked + minute)
    assert rhythm.is_broken(asked + minute + 1)
    last = beat(rhythm, asked + SECOND, SECOND, 5)
    assert not rhythm.is_broken(last + minute)
    assert rhythm.is_broken(last + minute + 1)
    assert rhythm.measure_silence(last + minute) == 60.0
    rhythm.admit(last + minute)
    assert not rhythm.is_broken(last + 3 * minute)
    assert rhythm.is_broken(last + 3 * minute + 1)


def test_a_quiet_option_a_few_trades_and_events_are_natural() -> None:
    steady = ["ticker.BTC-27MAR27-90000-C.100ms", "incremental_ticker.BTC_USDC", "deribit_price_index.btc_usd"]
    steady += [f"{kind}.BTC_USDC-PERPETUAL{rest}" for kind, rest in (
        ("book", ".100ms"), ("book", ".none.10.100ms"), ("quote", ""), ("ticker", ".raw"), ("perpetual", ".raw"),
    )]  # fmt: skip
    others = ["quote.BTC-27MAR27-90000-C", "book.BTC-27MAR27-90000-C.100ms", "trades.BTC-27MAR27-90000-C.100ms"]
    others += ["trades.ALGO_USDC-PERPETUAL.100ms", "trades.future.any.100ms", "instrument.state.any.any"]
    others += ["chart.trades.BTC-PERPETUAL.1", "platform_state", "user.portfolio.any"]
    assert [name for name in [*steady, *others] if is_never_quiet(parse_channel(name))] == steady


def test_one_long_silence_is_forgotten_in_time() -> None:
    rhythm = Rhythm()
    last = beat(rhythm, SECOND, SECOND, SAMPLES + 1) + 600 * SECOND
    come(rhythm, last)
    assert not rhythm.is_broken(last + 1700 * SECOND)
    last = beat(rhythm, last + SECOND, SECOND, 500)
    assert rhythm.is_broken(last + 60 * SECOND)


def test_an_outage_is_nobodys_silence() -> None:
    rhythm = Rhythm()
    last = beat(rhythm, SECOND, SECOND, SAMPLES + 1)
    later = last + 3600 * SECOND
    rhythm.restart(last + SECOND // 2, later)  # what came between the last look and the loss
    rhythm.look(last + SECOND // 2, later + SECOND)
    assert not rhythm.is_broken(later + 19 * SECOND)
    assert rhythm.is_broken(later + 21 * SECOND)  # asked for again, it has never come back
    end = beat(rhythm, later + 10 * SECOND, SECOND, 3)
    assert not rhythm.is_broken(end + QUIET)
    assert rhythm.is_broken(end + 21 * SECOND)  # the hour away has not become a part of the rhythm


def test_lag_that_lasts_is_told_and_rising_lag_is_hopeless() -> None:
    watch = LagWatch()
    for _ in range(LASTING - 1):
        watch.add(LAGGING + 1)
        watch.end_second()
        assert not watch.is_lagging
    watch.add(LAGGING + 1)
    assert not watch.end_second()
    assert watch.is_lagging
    watch.add(LAGGING + 1)
    watch.add(SECOND)  # the least of a second counts: one that is late alone is not the stream's lag
    watch.end_second()
    assert not watch.is_lagging
    hopeless = []
    for second in range(LASTING):
        watch.add((31 + second) * SECOND)
        hopeless.append(watch.end_second())
    assert hopeless == [False] * (LASTING - 1) + [True]


def test_lag_that_is_great_but_does_not_rise_is_no_reason_to_leave() -> None:
    watch = LagWatch()
    for jitter in (0, 3, 1, 4, 1, 5, 9, 2, 6, 5):
        watch.add(40 * SECOND + jitter * SECOND // 100)
        assert not watch.end_second()
    assert watch.is_lagging
    slow = []
    for second in range(40):
        watch.add(40 * SECOND + second * SECOND // 10)
        slow.append(watch.end_second())
    assert slow == [False] * 31 + [True] * 9  # a slow rise is one as well


def test_a_silence_that_led_to_nothing_is_out_of_the_rhythm_no_more() -> None:
    rhythm, last = Rhythm(), 0
    for last in range(SECOND, 31 * SECOND, SECOND):
        come(rhythm, last)
    assert rhythm.is_broken(last + 25 * SECOND)
    rhythm.admit(last + 25 * SECOND)
    rhythm.restart(last, last + 26 * SECOND)
    assert not rhythm.is_broken(last + (26 + 74) * SECOND)
    assert rhythm.is_broken(last + (26 + 76) * SECOND)


def test_reading_rests_only_when_frames_come_fast_and_one_by_one() -> None:
    def read(pause: float, rate: int, burst: int) -> bool:
        pace, frames, now, rested = Pace(pause), 0, SECOND, False
        for _ in range(rate // burst // 10):
            frames, now = frames + burst, now + SECOND * burst // rate
            rested = pace.should_pause(frames, now)
        return rested

    assert read(0.0001, 20_000, 1)
    assert not read(0.0001, 5_000, 1)
    assert not read(0.0001, 100_000, 64)
    assert not read(0.0, 20_000, 1)


def test_reading_rests_by_the_rate_of_now_also_after_the_clock_was_set_back() -> None:
    pace, rested = Pace(0.0001), []
    for start, rate in ((7200 * SECOND, 20_000), (3600 * SECOND, 5_000)):
        before = pace._seen
        for number in range(rate // 10):
            rests = pace.should_pause(before + number + 1, start + number * SECOND // rate)
        rested.append(rests)
    assert rested == [True, False]
