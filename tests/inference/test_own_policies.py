"""Policies of a user's own: registered by a program, or offered by an installed package."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_decoders import decoder_of, tiny
from training_runs import make_experiment, small_plan, train_alone

from skippipe import FixedLayers, Policy, PolicyContext, PolicyEntry, build_policy, register_policy
from skippipe.cli.main import main
from skippipe.errors import InputError
from skippipe.inference.policies import registry
from skippipe.inference.policies.registry import OWN, describe_policies, find_policy
from skippipe.monitor.evaluation_results import Evaluation

MODULE = '''
"""Every n-th stage of a model."""

from skippipe import FixedLayers, Policy, PolicyContext, PolicyEntry


def build(context: PolicyContext) -> Policy:
    stages = context.decoder.present_stages[:: int(context.argument or 2)]
    return FixedLayers(context.decoder.layers_of_stages(stages), len(stages))


ENTRY = PolicyEntry("mine", "every second stage", build, argument="3")
OTHER = PolicyEntry("other", "the same", build)
ALL = PolicyEntry("random", "nothing random at all", build)
NOTHING = 7
'''


def install(folder: Path, package: str, **offers: str) -> Path:
    """Put a package with these entry points where pip would put it; return the folder, to be on the path."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(MODULE)
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {module}{where}" for name, where in offers.items()]
    (information / "entry_points.txt").write_text("\n".join(["[skippipe.policies]", *lines, ""]))
    return folder


@pytest.fixture(autouse=True)
def _registered_by_one_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    for module in ("my_policies", "their_policies"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train_alone(make_experiment(folder), small_plan())
    return folder / "run"


def results_in(output: str) -> dict[str, tuple[float, float, float]]:
    """Return perplexity, share and layers of each policy from what the command printed."""
    results = Evaluation.model_validate_json(output).results
    return {result.policy: (result.perplexity, result.share_computed, result.kept_layers) for result in results}


def test_evaluate_runs_the_policy_of_an_installed_package(run_dir: Path, tmp_path: Path) -> None:
    site = install(tmp_path / "site", "my-policies", mine=":ENTRY")
    program = f"import sys; sys.path.insert(0, {str(site)!r}); from skippipe.cli.main import main; main(sys.argv[1:])"
    options = ["--batches", "1", "--json", "--keep", "0.5", "--policy", "mine", "stages:0,2"]
    done = subprocess.run(
        [sys.executable, "-c", program, "evaluate", str(run_dir), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = results_in(done.stdout)
    assert results["mine"] == results["stages:0,2"]


def test_help_lists_all_policies_and_loads_none(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "my-policies", mine=":ENTRY")
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from skippipe.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print({'torch', 'transformers', 'my_policies'} & {*sys.modules})"
    )
    for command in ("evaluate", "generate"):
        done = subprocess.run(
            [sys.executable, "-c", program, command, "--help"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        *text, loaded = done.stdout.splitlines()
        assert loaded == "set()"
        listed = [line.split("  ") for line in text[text.index("Policies:") + 1 :]]
        assert [words[1] for words in listed] == [*(entry.usage for entry in OWN), "mine"]
        assert listed[-1][-1] == "of the package my-policies"


def test_an_argument_comes_to_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "my-policies", mine=":ENTRY"))
    context = PolicyContext(decoder_of(tiny("llama", num_hidden_layers=6)), 0.5)
    assert build_policy("mine", context).layers_at(3, 1) == (0, 2, 4)
    assert build_policy("mine:3", context).layers_at(3, 1) == (0, 3)
    assert describe_policies()["mine"] == "every second stage", (
        "a package that has been loaded says what its policy does"
    )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (":GONE", "policy 'mine' of the package my-policies: my_policies:GONE cannot be loaded .AttributeError"),
        ("_gone:ENTRY", "my_policies_gone:ENTRY cannot be loaded .ModuleNotFoundError: No module named"),
        (":NOTHING", "my_policies:NOTHING is a int; it has to be a PolicyEntry"),
        (":OTHER", "my_policies:OTHER calls itself 'other'"),
    ],
)
def test_a_broken_offer_is_named(where: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "my-policies", mine=where))
    with pytest.raises(InputError, match=expected):
        find_policy("mine")
    assert find_policy("random")[0] in OWN, "other policies work all the same"


def test_two_packages_with_one_name_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("their-policies", "my-policies"):
        monkeypatch.syspath_prepend(install(tmp_path / package, package, mine=":ENTRY"))
    with pytest.raises(InputError, match="offered by the package my-policies and by the package their-policies"):
        find_policy("mine")


def test_no_package_takes_the_name_of_a_policy_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "my-policies", random=":ALL"))
    assert find_policy("random")[0] in OWN
    assert "policy 'random': SkipPipe's own; that of the package my-policies is left aside" in caplog.text


def first_half(context: PolicyContext) -> Policy:
    return FixedLayers(context.decoder.all_layers[: context.decoder.num_layers // 2])


def test_a_program_registers_a_policy_and_runs_a_command_with_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = register_policy(PolicyEntry("first-half", "the first half of the layers", first_half))
    assert register_policy(entry) is entry, "the same may be registered again, as a module that is imported twice does"
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), "--batches", "1", "--policy", "first-half", "exit", "--keep", "0.5", "--json"])
    assert not stop.value.code
    results = results_in(capsys.readouterr().out)
    assert results["first-half"] == results["exit"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random", "policy 'random': there is another of this name"),
        ("a:b", "policy 'a:b': a name is made of letters"),
        ("two words", "a name is made of letters"),
        ("--keep", "a name is made of letters"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        register_policy(PolicyEntry(name, "", first_half))


def test_a_policy_that_decides_alone_shows_how() -> None:
    with pytest.raises(InputError, match="needs an example of the argument"):
        PolicyEntry("mine", "", first_half, decides_keep=True)


def test_every_policy_of_ours_can_be_built() -> None:
    for entry in OWN:
        assert callable(entry.builder()), entry.name
