"""The pages in docs/: they show what their generators write today, and their links lead somewhere."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from architectures import ARCHITECTURES, MAIN, Architecture
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING
from tuned import Tuned

import peft_s0.serving
from peft_s0 import registered_mixers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from make_architectures import (  # noqa: E402
    CHECKPOINTS,
    PAGE,
    checkpoint_config,
    limits,
    millions,
    page,
    recurrent_layers,
    results,
    sizes,
    states,
)
from make_padding import PAGE as PADDING  # noqa: E402
from make_padding import errors  # noqa: E402

ROWS = {row.name: row for row in ARCHITECTURES}
PUBLIC = sorted(ROWS.keys() & CHECKPOINTS.keys())


def test_the_page_is_what_its_generator_writes() -> None:
    # How many laws hold is all that comes from test results; it is taken from the page.
    lines = [[cell.strip("` ") for cell in line.split("|")] for line in PAGE.read_text().splitlines()]
    held = {line[1]: line[-2] for line in lines if len(line) > 2 and line[1] in ROWS}
    assert held.keys() == ROWS.keys(), "rows came or went; write the page anew, see docs/make_architectures.py"
    assert PAGE.read_text() == page(held), "the page is out of date; write it anew, see docs/make_architectures.py"


def test_the_page_shows_every_declaration() -> None:
    text = PAGE.read_text()
    for mixer in registered_mixers():
        assert mixer.path in text or f"{mixer.path.rpartition('.')[2]} ({mixer.family.name})" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_5", ("32 x 128 x 128", "24", "12.6 M", "50.3 MB")),
        ("falcon_h1", ("24 x 128 x 256", "44", "34.6 M", "138.4 MB")),
    ],
)
def test_the_sizes_that_the_paper_gives(name: str, expected: tuple[str, ...]) -> None:
    assert sizes(ROWS[name])[1:] == expected


def test_small_sizes_do_not_round_to_nothing() -> None:
    assert [millions(number) for number in (46_080, 1_000_000, 12_582_912)] == ["0.046", "1.0", "12.6"]


def test_checkpoints_are_of_architectures_and_say_where_they_were_read() -> None:
    assert CHECKPOINTS.keys() <= ROWS.keys() | set(CONFIG_MAPPING)
    for entry in CHECKPOINTS.values():
        assert entry["checkpoint"].count("/") == 1
        assert entry["sources"]
        assert all(source.startswith("https://") for source in entry["sources"])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_checkpoint_s_config_has_the_names_of_its_class(name: str) -> None:
    # A name that a config class does not have becomes an attribute that nothing reads.
    def check(config: Any, values: dict[str, Any]) -> None:
        assert values.keys() <= {field.name for field in dataclasses.fields(config)}
        for key, value in values.items():
            if dataclasses.is_dataclass(getattr(config, key)):
                check(getattr(config, key), value)

    check(checkpoint_config(ROWS[name]), CHECKPOINTS[name]["config"])


def test_no_checkpoint_no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHECKPOINTS, "qwen3_5")
    assert sizes(ROWS["qwen3_5"]) == ("none known", "", "", "", "")


def test_s0_has_the_parameters_and_the_file_that_the_page_counts(tuned: Tuned, tmp_path: Path) -> None:
    row = tuned.architecture
    parameters = sum(map(math.prod, states(recurrent_layers(row, row.config()))))
    assert tuned.model.get_nb_trainable_parameters()[0] == parameters
    tuned.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(state.nbytes for state in stored.values()) == 4 * parameters


def test_laws_are_counted_by_architecture(tmp_path: Path) -> None:
    file = tmp_path / "laws.xml"
    file.write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_a[qwen4_exp-True]"><failure/></testcase><testcase name="test_a[qwen4_exp-False]"/>'
        '<testcase name="test_b[qwen4_exp]"/><testcase name="test_c[qwen4_exp]"><skipped/></testcase>'
        '<testcase name="test_b[qwen4_exp_ple]"><error/></testcase><testcase name="test_d"/>'
        "</testsuite></testsuites>"
    )
    counted = results(file)
    assert counted.keys() == ROWS.keys()
    assert {name: held for name, held in counted.items() if held != "0 of 0"} == {
        "qwen4_exp": "1 of 2",
        "qwen4_exp_ple": "0 of 1",
    }


def test_limits_have_one_line_for_an_architecture_and_a_reason() -> None:
    lines = limits().splitlines()
    assert len(lines) == len({(row.name, reason) for row in ARCHITECTURES for _, reason in row.lacks})
    for row in ARCHITECTURES:
        for law, reason in row.lacks:
            (line,) = [line for line in lines if line.startswith(f"- `{row.name}`: {reason} (")]
            assert law.replace("_", " ") in line


@pytest.mark.parametrize("row", MAIN, ids=lambda row: row.name)
def test_the_padding_page_shows_what_its_script_measures(row: Architecture) -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PADDING.read_text().splitlines()]
    (head,) = (line for line in lines if line and line[0].startswith("a row of"))
    shown = {line[0]: line[1:] for line in lines if len(line) == len(head)}
    column = head.index(f"{row.name}, by hand") - 1
    for case, (by_hand, with_s0) in errors(row).items():
        # Rounding differs between processors.
        assert abs(share(shown[case][column]) - share(by_hand)) <= 0.01
        assert max(share(with_s0), share(shown[case][column + 1])) < 1e-5
        if "pads" in case or "packed" in case:
            assert share(by_hand) > 0.05


def share(cell: str) -> float:
    return float(cell.removesuffix("%")) / 100 if cell.endswith("%") else float(cell)


@pytest.mark.parametrize("module", [peft_s0, peft_s0.serving], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module: ModuleType) -> None:
    shown = {*re.findall(r"[\w.]+", (ROOT / "docs" / "reference.md").read_text())}
    names = [name for name in module.__all__ if not {name, f"{module.__name__}.{name}"} & shown]
    assert not names


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    # The site's builder looks at links within the site; these also lead to files of the repository.
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target
