"""The order of samples: every sample once an epoch, a pure function of seed, step and microbatch."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from skippipe.data.samples import SampleOrder, text_of, text_together
from skippipe.data.token_cache import TokenCache
from skippipe.data.tokenizer import ByteTokenizer
from skippipe.errors import CheckpointError, DataError

LENGTH = 4


def order(num_tokens: int = 101, seed: int = 0, fingerprint: str = "f") -> SampleOrder:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    cache = TokenCache(Path(), tokens, tokens, num_tokens, fingerprint, ByteTokenizer())
    return SampleOrder(cache, seed=seed, sequence_length=LENGTH)


def test_labels_are_the_next_tokens() -> None:
    input_ids, labels = order().batch(step=0, microbatch=0, num_microbatches=2, micro_batch_size=3)
    assert input_ids.shape == labels.shape == (3, LENGTH)
    assert (labels == input_ids + 1).all()


@given(num_tokens=st.integers(6, 60), batch=st.integers(1, 3), microbatches=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_is_a_permutation(num_tokens: int, batch: int, microbatches: int, seed: int) -> None:
    samples = order(num_tokens, seed)
    count = samples.num_samples["train"]
    seen: list[int] = []
    step = 0
    while len(seen) < 2 * count:
        for microbatch in range(microbatches):
            input_ids, _ = samples.batch(step, microbatch, microbatches, batch)
            seen += [int(row[0]) // LENGTH for row in input_ids]
        step += 1
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))


def test_epochs_and_seeds_have_their_own_order() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        samples = order(401, seed)
        return [int(samples.batch(number * 100 + step, 0, 1, 1)[0][0, 0]) for step in range(100)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_next_batch_after_a_fresh_start_is_the_same() -> None:
    running = order()
    for step in range(20):
        expected = running.batch(step, 1, 2, 3)
    assert all((a == b).all() for a, b in zip(order().batch(19, 1, 2, 3), expected, strict=True))


def test_cursor_accepts_its_own_and_refuses_others() -> None:
    cursor = order().cursor(step=7, num_microbatches=4, micro_batch_size=2)
    assert cursor["samples_seen"] == 56
    order().check_cursor(cursor, 7, 4, 2)
    for other, steps, batch in (
        (order(seed=1), 7, 2),
        (order(fingerprint="g"), 7, 2),
        (order(), 8, 2),
        (order(), 7, 3),
    ):
        with pytest.raises(CheckpointError, match="data order"):
            other.check_cursor(cursor, steps, 4, batch)


def test_validation_sees_every_sample_and_wraps_around() -> None:
    samples = order(LENGTH * 3 + 1)
    first, second = (samples.validation_batch(index, 2)[0][:, 0].tolist() for index in range(2))
    assert sorted([*first, second[0]]) == [0, 4, 8]
    assert second[1] == first[0]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="4 tokens, a sample needs 5"):
        order(num_tokens=4)


def test_training_and_validation_batches_differ() -> None:
    samples = order(LENGTH * 8 + 1)
    found = [samples.validation_batch(index, 2)[0] for index in range(4)]
    assert sorted(int(row[0]) // LENGTH for batch in found for row in batch) == list(range(8))
    assert any((a != samples.batch(index, 0, 1, 2)[0]).any() for index, a in enumerate(found))


@given(step=st.integers(0, 50), microbatch=st.integers(0, 3), seed=st.integers(0, 5))
def test_batch_does_not_depend_on_what_was_read_before(step: int, microbatch: int, seed: int) -> None:
    used = order(seed=seed)
    for earlier in range(0, step, 7):
        used.batch(earlier, 0, 4, 2)
    expected = order(seed=seed).batch(step, microbatch, 4, 2)
    assert (used.batch(step, microbatch, 4, 2)[0] == expected[0]).all()


def test_text_that_others_read_is_read_here_once_it_is_needed() -> None:
    whole, read = order().cache, list[str]()

    def read_now() -> TokenCache:
        read.append("now")
        return whole

    distant = SampleOrder(read_now, seed=0, sequence_length=LENGTH, text=text_of(whole))
    assert distant.cursor(3, 2, 2) == order().cursor(3, 2, 2)
    assert (distant.is_read, distant.num_samples, read) == (False, order().num_samples, [])
    assert (distant.batch(1, 0, 2, 2)[0] == order().batch(1, 0, 2, 2)[0]).all()
    assert (distant.batch(2, 0, 2, 2)[0] == order().batch(2, 0, 2, 2)[0]).all()
    assert read == ["now"]


def test_a_host_with_a_text_of_its_own_has_the_samples_of_that_one() -> None:
    """But epochs are counted by all texts together, each once."""
    short, long = order(41, fingerprint="short"), order(101, fingerprint="long")
    texts = {"iowa-0": short.text, "iowa-1": short.text, "tokyo-0": long.text}
    together = text_together(texts)
    assert together.num_tokens == {"train": 142, "validation": 142}
    assert together == text_together(dict(reversed(texts.items())))
    for alone in (short, long):
        own = SampleOrder(partial(getattr, alone, "cache"), seed=0, sequence_length=LENGTH, text=together)
        assert (own.batch(7, 1, 4, 2)[0] == alone.batch(7, 1, 4, 2)[0]).all()
        assert (own.validation_batch(3, 2)[0] == alone.validation_batch(3, 2)[0]).all()
        assert own.cursor(9, 4, 1)["epoch"] == 36 // (141 // LENGTH)
        assert own.cursor(9, 4, 1)["tokens"] == together.fingerprint
    with pytest.raises(CheckpointError, match="tokens"):
        own.check_cursor(short.cursor(9, 4, 1), 9, 4, 1)


def test_text_is_compared_with_that_of_the_others_or_with_what_the_node_had() -> None:
    one, other = order(fingerprint="f"), order(fingerprint="g")
    one.text.check(one.cache, "iowa-0")
    with pytest.raises(DataError, match=r"iowa-0 has other tokens \(g\) than the others \(f\); .* the same corpus"):
        one.text.check(other.cache, "iowa-0")
    together = text_together({"iowa-0": one.text, "tokyo-0": other.text})
    together.check(other.cache, "tokyo-0")
    together.check(order(fingerprint="h").cache, "paris-0")
    with pytest.raises(DataError, match=r"tokyo-0 has other tokens \(f\) than it had before \(g\); .* the text it had"):
        together.check(one.cache, "tokyo-0")
