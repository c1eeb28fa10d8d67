"""What the doctor says of Megatron and of whatever is called apex, with made-up packages on the Python path."""

import subprocess
import sys

import pytest

from ssdtrain_plugin.doctor import examine_machine
from ssdtrain_plugin.doctor.packages import apex_finding, megatron_finding

WAY_OUT = "`pip uninstall apex`"
BREAKS = (
    "Megatron takes it for NVIDIA's, and with `--transformer-impl local` no model can be built: "
    '"Apex must be installed to use FusedLayerNorm."; DeepSpeed ignores it; '
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is all of the Python path: what it does not hold is not installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(site, *modules, distribution=None, version="1.0"):
    """Write packages that cannot be imported: looking at them must not run them."""
    for name in modules:
        folder = site.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    if distribution:
        info = site / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def install_megatron(site, version, *others):
    (site / "megatron" / "core").mkdir(parents=True)
    (site / "megatron" / "core" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    lines = [f"{key} = {number}" for key, number in zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)]
    text = "# comment\n" + "\n".join(lines) + '\nPRE_RELEASE = ""\nVERSION = (MAJOR, MINOR, PATCH)\n'
    (site / "megatron" / "core" / "package_info.py").write_text(text)
    install(site, *others)


# --- Megatron


def test_no_megatron_is_no_fault(site):
    finding = megatron_finding()
    assert finding.fact == "megatron-core is not installed; only training with Megatron needs it"
    assert finding.advice is None


def test_another_package_called_megatron_is_not_megatron_core(site):
    install(site, "megatron")
    assert megatron_finding().fact.startswith("megatron-core is not installed")


@pytest.mark.parametrize(
    ("version", "others", "fact", "advice"),
    [
        (
            "0.16.1",
            (),
            "megatron-core 0.16.1, no megatron.training (a checkout of Megatron-LM on PYTHONPATH has it; own loops "
            "need none), no triton",
            None,
        ),
        (
            "0.17.1",
            ("megatron.training",),
            "megatron-core 0.17.1, megatron.training, no triton",
            None,
        ),
        (
            "0.19.2",
            ("megatron.training", "triton"),
            "megatron-core 0.19.2, megatron.training, triton",
            None,
        ),
        (
            "0.18.0",
            ("megatron.training",),
            "megatron-core 0.18.0, megatron.training, no triton",
            "from 0.18 on `import megatron.core` fails without triton; `pip install triton`",
        ),
        (
            "0.15.2",
            ("megatron.training", "triton"),
            "megatron-core 0.15.2, megatron.training, triton",
            "this release is older than any that the plugin was tested with; take 0.16.1 or newer",
        ),
        ("1.0.0", ("megatron.training", "triton"), "megatron-core 1.0.0, megatron.training, triton", None),
    ],
)
def test_megatron_with_what_it_needs_beside(site, version, others, fact, advice):
    install_megatron(site, version, *others)
    finding = megatron_finding()
    assert (finding.fact, finding.advice) == (fact, advice)


def test_a_checkout_beside_an_installed_core_gives_the_training_loop(tmp_path, site, monkeypatch):
    install_megatron(site, "0.16.1")
    (tmp_path / "checkout" / "megatron" / "training").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "checkout")])
    assert megatron_finding().fact.startswith("megatron-core 0.16.1, megatron.training")


def test_a_core_that_says_no_version_is_unknown(site):
    install(site, "megatron.core")
    assert megatron_finding().fact.startswith("unknown: ")


def test_the_installed_release_is_recognised():
    core = pytest.importorskip("megatron.core")
    assert megatron_finding().fact.startswith(f"megatron-core {core.__version__},")


# --- apex


def test_no_apex_is_no_fault(site):
    finding = apex_finding()
    assert finding.fact == "not installed; Megatron and DeepSpeed do without it"
    assert finding.advice is None


def test_nvidias_own(site):
    install(site, "apex", "apex.normalization", "apex.optimizers", "fused_layer_norm_cuda", "amp_C")
    finding = apex_finding()
    assert finding.fact == ("from source; Megatron takes its layer norm (`--transformer-impl local`) and optimizers")
    assert finding.advice is None


def test_nvidias_own_with_a_version(site):
    parts = ("apex", "apex.normalization", "apex.optimizers", "fused_layer_norm_cuda", "amp_C")
    install(site, *parts, distribution="apex", version="0.1")
    assert apex_finding().fact.startswith("0.1; ")


@pytest.mark.parametrize(
    ("built", "unbuilt"),
    [
        ((), "fused_layer_norm_cuda and amp_C"),
        (("amp_C",), "fused_layer_norm_cuda"),
        (("fused_layer_norm_cuda",), "amp_C"),
    ],
)
def test_nvidias_own_without_its_kernels(site, built, unbuilt):
    install(site, "apex", "apex.normalization", "apex.optimizers", *built)
    assert apex_finding().advice == (
        f"it was built without {unbuilt}; Megatron takes it all the same and fails in the first step; build it with "
        "its CUDA extensions, or `pip uninstall apex`"
    )


def test_an_impostor_from_the_package_index(site):
    install(site, "apex", "apex.lib", distribution="apex", version="0.9.10.dev0")
    finding = apex_finding()
    assert finding.fact == (
        f"apex 0.9.10.dev0 in `{site}` is something else: it has no apex.normalization and no apex.optimizers"
    )
    assert finding.advice == BREAKS + WAY_OUT


def test_an_impostor_that_is_one_file(site):
    (site / "apex.py").write_text("raise SystemExit('it was imported')\n")
    finding = apex_finding()
    assert finding.fact.startswith(f"the module apex in `{site}` is something else")
    assert finding.advice == f"{BREAKS}take `{site}` off the Python path"


def test_an_empty_folder_of_that_name_is_an_impostor_too(site):
    # `import apex` succeeds with it: Python takes a folder without `__init__.py` for a package.
    (site / "apex").mkdir()
    assert apex_finding().advice == f"{BREAKS}take `{site}` off the Python path"


def test_half_of_it_is_an_impostor(site):
    install(site, "apex", "apex.optimizers")
    assert apex_finding().fact.endswith("it has no apex.normalization")


def test_megatron_does_break_on_an_impostor(tmp_path):
    """What the advice says happens: this release chooses apex's layer norm, and a layer of it cannot be made."""
    pytest.importorskip("megatron.core")
    (tmp_path / "apex.py").touch()
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from megatron.core.models.gpt import gpt_layer_specs\n"
        "from megatron.core.transformer.transformer_config import TransformerConfig\n"
        "config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)\n"
        "gpt_layer_specs.LNImpl(config, 64)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert "Apex must be installed to use FusedLayerNorm." in result.stderr


def test_the_machine_report_ends_with_the_packages(site):
    (site / "apex.py").touch()
    *_, megatron, apex = examine_machine()
    assert (megatron.name, apex.name) == ("Megatron", "NVIDIA apex")
    assert apex.advice
