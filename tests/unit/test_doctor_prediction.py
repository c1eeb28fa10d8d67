"""The formula counts what the hooks count, and the prediction follows from it by arithmetic."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.doctor import Bandwidth, ModelShape, predict
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.units import GIB

BATCH, SEQUENCE, HIDDEN, HEADS = 2, 64, 128, 4


def shape(**fields):
    defaults = {
        "layers": 1,
        "hidden": HIDDEN,
        "heads": HEADS,
        "sequence": SEQUENCE,
        "micro_batch": BATCH,
        "tflops": 100.0,
        "dropout": False,
    }
    return ModelShape(**{**defaults, **fields})


def drive(write, read):
    return Bandwidth(0, 0, 4, write, write, read)


# --- against what the hooks count


class Attention(nn.Module):
    def __init__(self, *, has_scores):
        super().__init__()
        self.first, self.last = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.has_scores = has_scores

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.first(x).view(b, s, 3, HEADS, h // HEADS).permute(2, 0, 3, 1, 4)
        if self.has_scores:
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.last(y.transpose(1, 2).reshape(b, s, h))


class Feedforward(nn.Module):
    def __init__(self, *, is_gated, multiplier=4):
        super().__init__()
        size = int(multiplier * HIDDEN)
        self.first = nn.Linear(HIDDEN, 2 * size if is_gated else size)
        self.last = nn.Linear(size, HIDDEN)
        self.is_gated = is_gated

    def forward(self, x):
        if self.is_gated:
            gate, value = self.first(x).chunk(2, -1)
            return self.last(nn.functional.silu(gate) * value)
        return self.last(nn.functional.gelu(self.first(x)))


class Layer(nn.Module):
    def __init__(self, *, has_scores=False, is_gated=False, dropout=0.0):
        super().__init__()
        self.attention, self.feedforward = Attention(has_scores=has_scores), Feedforward(is_gated=is_gated)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.feedforward(self.norm2(x)))


def counted_bytes(model, dtype=torch.float32, context=None):
    """What our hooks count in one forward, without moving anything."""
    torch.manual_seed(3)
    with ssdtrain.attach(model.to(dtype), {"policy": "none", "min_tensor_bytes": 1}) as offloader:
        with context or contextlib.nullcontext():
            loss = model(torch.randn(BATCH, SEQUENCE, HIDDEN, dtype=dtype)).sum()
        loss.backward()
        return offloader.end_step().saved_bytes


def row_bytes(element, *, has_scores=False):
    """What the formula leaves out: two statistics of two norms a row, and the log-sum-exp of attention in fp32."""
    return BATCH * SEQUENCE * (4 * element + (0 if has_scores else 4 * HEADS))


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("has_scores", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_formula_is_what_the_hooks_count(dtype, element, has_scores, is_gated):
    model = Layer(has_scores=has_scores, is_gated=is_gated)
    predicted = shape(bytes_per_element=element, flash_attention=not has_scores, gated_feedforward=is_gated)
    assert counted_bytes(model, dtype) == predicted.saved_bytes + row_bytes(element, has_scores=has_scores)


def test_layers_add_up():
    model = nn.Sequential(*(Layer() for _ in range(3)))
    assert counted_bytes(model) == shape(layers=3, bytes_per_element=4).saved_bytes + 3 * row_bytes(4)


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_on_cpu_a_mask_of_dropout_is_an_element_and_not_a_byte(dtype, element):
    predicted = shape(bytes_per_element=element, dropout=True)
    two_masks = 2 * (element - 1) * SEQUENCE * BATCH * HIDDEN
    assert counted_bytes(Layer(dropout=0.1), dtype) == predicted.saved_bytes + row_bytes(element) + two_masks


def test_autocast_saves_more_than_the_formula_says():
    """It keeps the inputs of the norms in fp32: 2 of the 16 elements take 4 bytes instead of 2."""
    context = torch.autocast("cpu", torch.bfloat16)
    predicted = shape(bytes_per_element=2).saved_bytes
    assert 1.10 < counted_bytes(Layer(), context=context) / predicted < 1.15


# --- against the papers


def test_the_coefficients_of_korthikanti():
    sbh = SEQUENCE * BATCH * HIDDEN
    scores = 5 * HEADS * SEQUENCE**2 * BATCH
    assert shape(dropout=True).saved_bytes == 34 * sbh
    assert shape(dropout=True, flash_attention=False).saved_bytes == 34 * sbh + scores
    split = shape(dropout=True, flash_attention=False, tensor_parallel=4)
    assert split.saved_bytes == (10 + 24 // 4) * sbh + scores // 4
    everything = split.model_copy(update={"sequence_parallel": True})
    assert everything.saved_bytes == 34 * sbh // 4 + scores // 4


@pytest.mark.parametrize(("hidden", "layers", "gib"), [(8192, 4, 11.13), (12288, 3, 12.60), (16384, 2, 11.50)])
def test_close_to_the_model_of_ssdtrain(hidden, layers, gib):
    """Its own estimate of activations a GPU: tensor parallelism of 2, flash attention, batch 16, 1024 tokens."""
    ours = shape(
        hidden=hidden, layers=layers, sequence=1024, micro_batch=16, tensor_parallel=2, dropout=True
    ).saved_bytes
    assert ours / GIB == pytest.approx(gib, rel=0.05)


def test_the_operations_of_a_forward():
    # 12 h^2 parameters a layer, 2 operations each a token; 2 products of s x s x h, 2 operations each.
    operations = 2 * 12 * HIDDEN**2 * SEQUENCE * BATCH + 4 * SEQUENCE**2 * HIDDEN * BATCH
    found = shape(tflops=1.0)
    assert found.forward_seconds == pytest.approx(operations / 1e12)
    assert found.backward_seconds == pytest.approx(2 * operations / 1e12)
    assert shape(tflops=2.0, layers=4, tensor_parallel=2).forward_seconds == pytest.approx(operations / 1e12)


# --- what follows from it


def test_a_fast_drive_hides_everything():
    found = predict(shape(), [drive(1e15, 1e15)], max_inflight_bytes=0)
    assert found.overhead_fraction == 0.0
    assert found.hidden_fraction == 1.0
    assert "fits" in found.advice


def test_a_drive_of_exactly_the_needed_speed_hides_everything():
    needed = predict(shape(), [drive(1.0, 1.0)], max_inflight_bytes=0)
    exact = drive(needed.needed_write_bytes_per_second, needed.needed_read_bytes_per_second)
    found = predict(shape(), [exact], max_inflight_bytes=0)
    assert found.overhead_fraction == pytest.approx(0.0, abs=1e-9)
    assert found.hidden_fraction == pytest.approx(1.0)


def test_a_drive_of_half_the_needed_speed_costs_one_more_step():
    needed = predict(shape(), [drive(1.0, 1.0)], max_inflight_bytes=0)
    half = drive(needed.needed_write_bytes_per_second / 2, needed.needed_read_bytes_per_second / 2)
    found = predict(shape(), [half], max_inflight_bytes=0)
    assert found.overhead_fraction == pytest.approx(1.0)
    assert found.hidden_fraction == pytest.approx(0.5)
    assert "offload_fraction: 0.5" in found.advice or "offload_fraction: 0.49" in found.advice
    assert "2 times the drives" in found.advice or "3 times the drives" in found.advice


def test_a_slow_drive_is_called_one():
    found = predict(shape(), [drive(1e6, 1e6)], max_inflight_bytes=0)
    assert "hardly anything" in found.advice


def test_what_may_be_in_flight_need_not_be_stored_in_forward():
    slow = [drive(1e6, 1e15)]
    assert predict(shape(), slow, max_inflight_bytes=0).overhead_fraction > 0
    assert predict(shape(), slow, max_inflight_bytes=shape().saved_bytes).overhead_fraction < 1e-9
    assert predict(shape(), slow).overhead_fraction < 1e-9  # 2 GiB by default


def test_what_is_in_flight_at_the_turn_is_not_read_back():
    found = predict(shape(), [drive(1e6, 1e3)], max_inflight_bytes=shape().saved_bytes)
    stored_bytes = shape().forward_seconds * 1e6
    waiting = stored_bytes / 1e3 - shape().backward_seconds
    assert found.overhead_fraction == pytest.approx(waiting / (3 * shape().forward_seconds))


def test_directories_add_up():
    one, two = (predict(shape(), [drive(1e6, 3e6)] * count) for count in (1, 2))
    assert (one.num_directories, two.num_directories) == (1, 2)
    assert two.write_bytes_per_second == 2 * one.write_bytes_per_second
    assert two.load_seconds == one.load_seconds / 2


_RATES = st.floats(1e3, 1e13)


@given(_RATES, _RATES, st.floats(1.0, 100.0), st.integers(0, 1 << 30))
def test_a_faster_drive_never_costs_more(write, read, factor, inflight):
    slow = predict(shape(layers=8), [drive(write, read)], max_inflight_bytes=inflight)
    fast = predict(shape(layers=8), [drive(write * factor, read * factor)], max_inflight_bytes=inflight)
    assert 0 <= fast.overhead_fraction <= slow.overhead_fraction + 1e-6 * (1 + slow.overhead_fraction)
    for found in (slow, fast):
        assert 0 < found.hidden_fraction <= 1
        assert found.overhead_fraction > 0 or found.hidden_fraction > 1 - 1e-6, "not hidden, but free"
        assert found.overhead_fraction < 1e-6 or found.hidden_fraction < 1, "hidden, but not free"


# --- the file


TEXT = "layers: 12\nhidden: 768\nheads: 12\nsequence: 1024\nmicro_batch: 8\ntflops: 0.5\n"


def test_a_file_is_read(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(TEXT)
    found = ModelShape.from_yaml(path)
    assert (found.layers, found.tflops, found.bytes_per_element, found.flash_attention) == (12, 0.5, 2, True)


def test_a_context_of_a_million_tokens_is_read(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(TEXT.replace("1024", str(2**20)))
    assert ModelShape.from_yaml(path).sequence == 2**20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + "colour: red\n", ["colour", "the fields are layers"]),
        ("layers: 0\n", ["layers: ", "hidden: ", "tflops: "]),
        (TEXT + "bytes_per_element: 3\n", ["bytes_per_element"]),
        ("- 1\n", ["file: "]),
        ("layers: [\n", ["while parsing"]),
    ],
)
def test_all_faults_of_a_file_are_listed(tmp_path, text, words):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ModelShape.from_yaml(path)
    assert all(word in str(caught.value) for word in words)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        ModelShape.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("field", ["layers", "hidden", "tflops", "tensor_parallel"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "x", None])
def test_a_value_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValidationError):
        shape(**{field: value})
