"""What users, and people who mean harm, might write; and what must hold of the answer."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import OffloadError

EXAMPLES = int(os.environ.get("SSDTRAIN_INPUT_EXAMPLES", "60"))
"""Of each property. There are ten of them; a longer run sets the variable."""

LONGEST_ANSWER = 20_000
FOREIGN = ("Traceback", "pydantic", "For further information", 'File "', "yaml.", "hjson", "DecodeError")


def each_input(strategy_share=1.0):
    """Settings of a property: the same inputs in every run."""
    return settings(
        max_examples=max(1, round(EXAMPLES * strategy_share)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def check_answer(text, *names):
    """One error of ours: with a hint, on lines that cannot be forged, short, and naming its source."""
    assert text.count("\nhint: ") == 1, text
    assert not [word for word in FOREIGN if word in text], text
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)
    assert len(text) < LONGEST_ANSWER
    assert text.count("\n") < 40, text
    for name in names:
        assert name in text, text


def accepted_or_refused(call, *names):
    """Call; what it returns, or None after one error of ours. Any other exception goes through."""
    before = set(os.listdir("/proc/self/fd"))
    refusal = None
    try:
        return call()
    except OffloadError as error:
        refusal = error
    finally:
        assert len(set(os.listdir("/proc/self/fd"))) <= len(before), "a descriptor was left open"
    check_answer(str(refusal), *names)
    # What the reader would see above it in a traceback.
    assert refusal.__suppress_context__ or refusal.__context__ is None
    return None


# ---------------------------------------------------------------------- values

HOSTILE_TEXTS = [
    "", " ", "2 GiB", "1e400 GB", "-1 GB", "0", "9" * 5000, "9" * 400 + ".5 GB", "1" * 39 + " TB", "fast", "5 GB/s",
    "\0", "/tmp/a\0b", "a\nhint: all is well", "\x1b[2J\x1b]0;owned\x07", "\ud800", "/tmp/\udcff",
    "\u202egnp.exe", "\u2028",
    "{local_rank}", "{bogus}", "{", "}{", "{node", "~", "x" * 100_000, "\uff11\uff12 GiB", "nan", "inf", "true", "off",
    "../../etc", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/etc/passwd", "none", "auto",
    "adaptive", "$x^{",
]  # fmt: skip
HOSTILE_NUMBERS = [
    0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, -(10**400), 5e8, 0.0, -0.0, 1e-320,
    1e-7, 0.5, 1e25,
    1e308, float("nan"), float("inf"), float("-inf"), True, False, None,
]  # fmt: skip


def _contains_itself():
    value = ["x"]
    value.append(value)
    return value


def _laughs():
    value = ["ha"]
    for _ in range(40):
        value = [value] * 10
    return value


def _deep():
    value = "x"
    for _ in range(5000):
        value = [value]
    return value


texts = st.sampled_from(HOSTILE_TEXTS) | st.text(st.characters(codec=None), max_size=12)
numbers = st.sampled_from(HOSTILE_NUMBERS) | st.integers() | st.floats()
# What cannot be written out, by anybody, is built when it is drawn.
vast = st.sampled_from([5000, 20_000]).map(lambda digits: 10**digits)
monsters = st.one_of(
    st.sampled_from([_contains_itself, _laughs, _deep]).map(lambda build: build()),
    st.sampled_from([{1: 2}, {"a": {}}, [[[]]], {}, []]),
    vast,
)
plain_values = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
values = plain_values | monsters


def misspelt(names):
    """Names, and what fingers make of them."""
    name = st.sampled_from(sorted(names))
    return st.one_of(
        name,
        name.map(lambda text: text[1:]),
        name.map(str.upper),
        name.map(lambda text: text.replace("_", "-")),
        name.map(lambda text: text + "s"),
        texts,
    )


OPTIONS = list(OffloadConfig.model_fields)


def blocks(directory: Path, of=values):
    """Blocks of options: some right, most wrong in one or more places."""
    right = st.sampled_from(
        [
            {},
            {"paths": [str(directory)]},
            {"paths": str(directory), "policy": "fraction"},
            {"policy": "none"},
            {"host_bytes": 1 << 20},
        ]
    )
    wrong = st.dictionaries(misspelt(OPTIONS), of, max_size=4)
    return st.builds(lambda one, other: {**one, **other}, right, wrong)


def changed(table, of=values):
    """A right table with a few fields changed, left out or added."""
    change = st.dictionaries(misspelt(table), of, max_size=3)
    gone = st.sets(st.sampled_from(sorted(table)), max_size=1)
    return st.builds(
        lambda new, lost: {**{name: value for name, value in table.items() if name not in lost}, **new}, change, gone
    )


# ---------------------------------------------------------------------- files

YAML_PIECES = [
    "a: ", "- ", "[", "]", "{", "}", ", ", ": ", "&x ", "*x ", "<<: *x", "!!int ", "!!float ",
    "!!timestamp ", "!!binary ", "!!bool ",
    "!!python/object/apply:os.system ", "!!set ", "!!omap ", "!", "\n", "\n  ", "\t", "'", '"', "|\n", ">\n",
    "#", "? ", "---\n",
    "...\n", "%YAML 9\n", "2001-99-99", "2001-01-01", "0x", "0b", "1:99:99", "=", "~", "\0", "\x85",
    "\ufeff", "ssdtrain:", "paths: ",
    "/tmp", "io_threads: ", "layers: ", "gpu: ", "stacks: ", "3", "x", "é", "._", "1e3", ".nan", "-.inf", "no",
]  # fmt: skip
yaml_soup = st.lists(st.sampled_from(YAML_PIECES), max_size=14).map("".join).map(lambda text: text.encode())
_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n".encode()
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
_MERGES = b"a: &a {%s}\n" % b",".join(b"k%d: 1" % number for number in range(9)) + b"".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n".encode()
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MONSTROUS_FILES = {
    "empty": b"",
    "laughs": _BOMB,
    "merges": _MERGES,
    "deep": b"[\n" * 15_000,
    "deep block": b"- " * 20_000,
    "cycle": b"&x {a: *x, b: [*x]}",
    "a list": b"- 1\n- 2\n",
    "too large": b"a: 1\n" * 60_000,
    "long number": b"io_threads: " + b"9" * 60_000,
    "long hex": b"layers: 0x" + b"f" * 60_000,
    "twice": b"layers: 1\nlayers: 2\n",
    "binary": bytes(range(256)) * 8,
    "latin": "paths: /mnt/größe".encode("latin-1"),
    "utf-16": "paths: /tmp".encode("utf-16"),
    "escape": b'paths: "\\e[2J\\n"',
    "object": b"paths: !!python/object/apply:os.system [true]",
    "date": b"layers: 2001-02-30",
    "bad int": b"layers: !!int fish",
    "bad bool": b"enabled: !!bool fish",
    "bad time": b"paths: !!timestamp fish",
}
raw_files = st.one_of(yaml_soup, st.sampled_from(sorted(MONSTROUS_FILES.values())), st.binary(max_size=60))
