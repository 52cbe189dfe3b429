"""The Hugging Face Hub through the real client, which uploads to and downloads from a server on loopback (hub.py)."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hub_client
import numpy as np
import pytest
from hub import TOKEN, Hub
from huggingface_hub import ModelCard

ROWS = ("qwen3_5", "falcon_h1")
STATES, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


class Process:
    """A process of its own that runs the functions of hub_client.py."""

    def __init__(self, **environment: str) -> None:
        self.environment = environment
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            # It starts here, with this environment.
            self._executor.submit(os.getpid).result()

    def __call__(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        return self._executor.submit(function, *arguments, **options).result()

    def end(self) -> None:
        self._executor.shutdown()


@pytest.fixture(scope="module")
def environment(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@pytest.fixture(scope="module")
def author(environment: dict[str, str]) -> Iterator[Process]:
    process = Process(**environment, HF_TOKEN=TOKEN)
    yield process
    process.end()


@pytest.fixture(scope="module")
def reader(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Another machine, as it were: no token, nothing in the cache."""
    process = Process(**environment | {"HF_HOME": str(tmp_path_factory.mktemp("reader"))})
    yield process
    process.end()


@pytest.fixture(scope="module", autouse=True)
def bases(author: Process) -> dict[str, np.ndarray]:
    """Logits of the base models that have names on the Hub."""
    return {row: author(hub_client.push_base, row, f"me/{row}") for row in ROWS}


def card_of(hub: Hub, repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repositories[repo_id].files(revision)[CARD].decode())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("how", ["peft", "s0", "transformers"])
def test_what_is_pushed_loads_bit_for_bit(
    hub: Hub, author: Process, reader: Process, bases, row: str, how: str
) -> None:
    expected = author(hub_client.push, row, f"me/pushed-{row}-{how}", 1, how)
    assert {STATES, CONFIG, CARD} <= set(hub.repositories[f"me/pushed-{row}-{how}"].files())
    assert np.abs(expected - bases[row]).max() > 0.3
    for load in (hub_client.load, hub_client.load_second, hub_client.load_with_transformers):
        assert np.array_equal(reader(load, row, f"me/pushed-{row}-{how}"), expected)


@pytest.mark.parametrize("row", ROWS)
def test_the_auto_classes_find_base_and_adapter(author: Process, reader: Process, row: str) -> None:
    repo_id = f"me/auto-{row}"
    expected = author(hub_client.push, row, repo_id, 2, "s0", tuned={"base": f"me/{row}"})
    for load in (hub_client.load_auto, hub_client.load_auto_with_transformers):
        assert np.array_equal(reader(load, row, repo_id), expected)


@pytest.mark.parametrize("row", ROWS)
def test_revisions(hub: Hub, author: Process, reader: Process, row: str) -> None:
    repo_id = f"me/revisions-{row}"
    first = author(hub_client.push, row, repo_id, 1, "s0")
    author(hub_client.tag, repo_id, "v1")
    commit = hub.repositories[repo_id].refs["main"]
    second = author(hub_client.push, row, repo_id, 2, "s0")
    third = author(hub_client.push, row, repo_id, 3, "s0", revision="next")
    fourth = author(hub_client.push, row, repo_id, 4, "s0", create_pr=True)
    assert not any(np.array_equal(first, other) for other in (second, third, fourth))
    for revision, expected in {"v1": first, commit: first, "main": second, "next": third, "refs/pr/1": fourth}.items():
        assert np.array_equal(reader(hub_client.load, row, repo_id, revision=revision), expected)
        assert np.array_equal(reader(hub_client.load_with_transformers, row, repo_id, revision=revision), expected)
    fifth = author(hub_client.push, row, repo_id, 5, "s0", revision="refs/pr/1")
    assert not np.array_equal(fifth, fourth)
    assert np.array_equal(reader(hub_client.load, row, repo_id, revision="refs/pr/1"), fifth)
    assert f'from_pretrained(model, "{repo_id}")' in card_of(hub, repo_id, "refs/pr/1").text
    _, text, untouched, _ = reader(hub_client.refusal, row, repo_id, revision="v9")
    assert untouched
    assert "RevisionNotFoundError" in text


@pytest.mark.parametrize("row", ROWS)
def test_a_private_repository(hub: Hub, author: Process, reader: Process, row: str) -> None:
    repo_id = f"me/private-{row}"
    expected = author(hub_client.push, row, repo_id, 1, "s0", private=True)
    assert hub.repositories[repo_id].private
    for how in ("load", "transformers"):
        _, text, untouched, _ = reader(hub_client.refusal, row, repo_id, how)
        assert untouched
        assert repo_id in text
        # PEFT's error comes from the client's, which says what to do; transformers has words of its own.
        assert "make sure you are authenticated" in text or "private repository" in text
    for load in (hub_client.load, hub_client.load_with_transformers):
        assert np.array_equal(reader(load, row, repo_id, token=TOKEN), expected)
    assert np.array_equal(author(hub_client.load, row, repo_id), expected)


@pytest.mark.parametrize("row", ROWS)
def test_adapters_of_other_names_are_in_folders(hub: Hub, author: Process, reader: Process, row: str) -> None:
    repo_id = f"me/named-{row}"
    expected = author(hub_client.push, row, repo_id, 1, "s0", tuned={"adapter_name": "task"})
    assert f"task/{STATES}" in hub.repositories[repo_id].files()
    assert np.array_equal(reader(hub_client.load, row, repo_id, subfolder="task"), expected)
    assert 'subfolder="task"' in card_of(hub, repo_id).text


def test_without_a_network_after_one_download(author: Process, reader: Process) -> None:
    """Both the adapter and its base model come from the cache."""
    expected = {}
    for row in ROWS:
        expected[row] = author(hub_client.push, row, f"me/offline-{row}", 1, "s0", tuned={"base": f"me/{row}"})
        author(hub_client.push, row, f"me/elsewhere-{row}", 1, "s0")
        reader(hub_client.load_auto, row, f"me/offline-{row}")
    process = Process(**reader.environment | {"HF_HUB_OFFLINE": "1"})
    for row in ROWS:
        for load in (hub_client.load, hub_client.load_auto, hub_client.load_auto_with_transformers):
            assert np.array_equal(process(load, row, f"me/offline-{row}"), expected[row])
        _, text, untouched, _ = process(hub_client.refusal, row, f"me/elsewhere-{row}")
        assert untouched
        assert "outgoing traffic has been disabled" in text or "offline mode" in text
    process.end()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "header only": lambda content: content[:200],
    "end missing": lambda content: content[:-10],
    "no safetensors": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("row", ROWS)
def test_a_damaged_file_is_refused_before_anything_is_attached(
    hub: Hub, author: Process, reader: Process, row: str, damage: str
) -> None:
    repo_id = f"me/damaged-{row}-{damage.replace(' ', '-')}"
    author(hub_client.push, row, repo_id, 1, "s0")
    whole = hub.repositories[repo_id].files()[STATES]
    hub.repositories[repo_id].commit({STATES: DAMAGES[damage](whole)})
    kind, text, untouched, used = reader(hub_client.refusal, row, repo_id)
    assert kind == "ValueError"
    assert re.search(rf"{STATES}' is not a whole safetensors file.*download it again with force_download=True", text)
    assert untouched
    assert used == "True"
    # transformers attaches first; what it could not load is not used.
    _, text, _, used = reader(hub_client.refusal, row, repo_id, "transformers")
    assert "Error" in text
    assert "was never loaded" in used


def test_a_download_that_breaks_off(hub: Hub, author: Process, reader: Process) -> None:
    """The client notices by itself, before S0 sees the file."""
    author(hub_client.push, "qwen3_5", "me/broken-off", 1, "s0")
    hub.break_off = STATES
    try:
        _, text, untouched, used = reader(hub_client.refusal, "qwen3_5", "me/broken-off")
    finally:
        hub.break_off = None
    assert untouched
    assert used == "True"
    assert "peer closed connection" in text or "Consistency check failed" in text


@pytest.mark.parametrize("row", ROWS)
def test_states_that_are_missing(hub: Hub, author: Process, reader: Process, row: str) -> None:
    repo_id = f"me/incomplete-{row}"
    author(hub_client.push, row, repo_id, 1, "s0")
    for files in hub.repositories[repo_id].commits.values():
        files.pop(STATES, None)
    _, text, _, used = reader(hub_client.refusal, row, repo_id)
    assert "Can't find weights" in text
    assert "was never loaded" in used
    # The config alone can be read.
    assert reader(hub_client.config, repo_id)["alpha"] == 0.7


@pytest.mark.parametrize("row", ROWS)
def test_the_card_is_enough(hub: Hub, author: Process, reader: Process, row: str) -> None:
    """A reader copies the card's example, and has the author's model."""
    repo_id = f"me/card-{row}"
    expected = author(hub_client.push, row, repo_id, 5, "s0", tuned={"base": f"me/{row}", "alpha": 0.65})
    card = card_of(hub, repo_id)
    for told in ("https://arxiv.org/abs/2604.01168", "pip install peft-s0", "import peft_s0", f"me/{row}", "| 0.65 |"):
        assert told in card.text
    assert card.text.index("KeyError: 'S0'") < 500
    assert card.data.base_model == f"me/{row}"
    assert card.data.library_name == "peft"
    assert {"peft", "s0-tuning", f"base_model:adapter:me/{row}"} <= set(card.data.tags)
    assert np.array_equal(reader(hub_client.follow_the_card, repo_id), expected)


def test_the_card_of_several_adapters_is_enough(author: Process, reader: Process) -> None:
    options = {"base": "me/qwen3_5", "adapter_name": "task"}
    expected = author(hub_client.push, "qwen3_5", "me/card-of-several", 6, "s0", tuned=options)
    assert np.array_equal(reader(hub_client.follow_the_card, "me/card-of-several"), expected)


def test_the_card_on_a_branch_is_enough(hub: Hub, author: Process, reader: Process) -> None:
    """It loads from there, and not what is on the main one."""
    for adapter_name in ("default", "task"):
        options, repo_id = {"base": "me/qwen3_5", "adapter_name": adapter_name}, f"me/card-on-a-branch-{adapter_name}"
        main = author(hub_client.push, "qwen3_5", repo_id, 7, "s0", tuned=options)
        branch = author(hub_client.push, "qwen3_5", repo_id, 8, "s0", tuned=options, revision="next")
        for revision, expected in (("main", main), ("next", branch)):
            assert np.array_equal(reader(hub_client.follow_the_card, repo_id, revision), expected)


def test_what_a_user_wrote_into_the_card_stays(hub: Hub, author: Process) -> None:
    repo_id = "me/edited"
    options: dict[str, Any] = {"base": "me/qwen3_5"}
    author(hub_client.push, "qwen3_5", repo_id, 1, "s0", tuned=options)
    card = card_of(hub, repo_id)
    card.data.tags += ["mine"]
    card.data["license"] = "mit"
    card.text = f"\n# My task\n\nIt does this.\n{card.text}\nAnd that.\n"
    hub.repositories[repo_id].commit({CARD: str(card).encode()})
    for _ in range(2):
        author(hub_client.push, "qwen3_5", repo_id, 2, "s0", tuned=options | {"alpha": 0.25})
        now = card_of(hub, repo_id)
        # PEFT takes the last line break away.
        assert now.text == card.text.replace("| 0.7 |", "| 0.25 |").rstrip("\n")
        assert now.data["license"] == "mit"
        assert "mine" in now.data.tags
    # PEFT's own push takes the card as it is.
    author(hub_client.push, "qwen3_5", repo_id, 3)
    assert card_of(hub, repo_id).text == now.text


def test_a_card_that_cannot_be_read_stays(hub: Hub, author: Process) -> None:
    """What a user wrote into it would be lost; also if the cache has what it was before."""
    for times in (1, 0):
        repo_id = f"me/withheld-{times}"
        for _ in range(times + 1):
            author(hub_client.push, "qwen3_5", repo_id, 1, "s0")
        hub.repositories[repo_id].commit({CARD: b"---\nlicense: mit\n---\n\n# Mine\n"})
        hub.withheld = CARD
        try:
            with pytest.raises(OSError, match=rf"(?s)card of '{repo_id}' cannot be read .*403.* Nothing was pushed"):
                author(hub_client.push, "qwen3_5", repo_id, 2, "s0")
        finally:
            hub.withheld = None
        assert card_of(hub, repo_id).text == "\n# Mine\n"


@pytest.mark.parametrize(
    ("name", "card"),
    [("syntax", b"---\nlicense: [mit\n---\n"), ("list", b"---\n- mit\n---\n"), ("bytes", b"---\na: b\n---\n\xff")],
)
def test_a_card_that_is_broken_stays(hub: Hub, author: Process, name: str, card: bytes) -> None:
    repo_id = f"me/broken-{name}"
    author(hub_client.push, "qwen3_5", repo_id, 1, "s0")
    hub.repositories[repo_id].commit({CARD: card})
    with pytest.raises(OSError, match=rf"(?s)card of '{repo_id}' is no text with metadata in YAML .*mend README\.md"):
        author(hub_client.push, "qwen3_5", repo_id, 2, "s0")
    assert hub.repositories[repo_id].files()[CARD] == card


def test_a_local_base_model_is_no_name_on_the_hub(hub: Hub, author: Process, tmp_path: Path) -> None:
    """The Hub refuses a card whose base model is a path, and a path is nobody's business."""
    author(hub_client.save_base, "qwen3_5", tmp_path / "base")
    author(hub_client.push, "qwen3_5", "me/local", 1, "s0", tuned={"base": str(tmp_path / "base")})
    card = card_of(hub, "me/local")
    assert str(tmp_path) not in str(card)
    assert card.data.base_model is None
    assert "of a local Qwen3_5ForCausalLM" in card.text
    # The user says what it is called; the next push, from the same path, keeps that.
    card.data.base_model = "me/qwen3_5"
    hub.repositories["me/local"].commit({CARD: str(card).encode()})
    author(hub_client.push, "qwen3_5", "me/local", 2, "s0", tuned={"base": str(tmp_path / "base")})
    assert card_of(hub, "me/local").data.base_model == "me/qwen3_5"
    with pytest.raises(ValueError, match="Use a model id from"):
        author(hub_client.push_card, "me/local", f"---\nbase_model: {tmp_path}\n---\n")


def test_a_saved_folder_can_be_uploaded_as_it_is(hub: Hub, author: Process, reader: Process, tmp_path: Path) -> None:
    expected = author(hub_client.push_folder, "falcon_h1", "me/folder", 1, tmp_path / "folder")
    assert np.array_equal(reader(hub_client.load, "falcon_h1", "me/folder"), expected)
    assert "import peft_s0" in card_of(hub, "me/folder").text


def test_cards_of_others_carry_the_tag(hub: Hub, author: Process, reader: Process, tmp_path: Path) -> None:
    """transformers and its trainer write cards of their own; the section comes in when S0 pushes to the repository."""
    author(hub_client.push, "qwen3_5", "me/by-transformers", 1, "transformers")
    author(hub_client.push_with_a_trainer, "qwen3_5", "me/by-a-trainer", tmp_path / "trainer", "me/qwen3_5")
    for repo_id in ("me/by-transformers", "me/by-a-trainer"):
        assert "s0-tuning" in card_of(hub, repo_id).data.tags
    before = card_of(hub, "me/by-a-trainer").text
    assert "Training procedure" in before
    expected = author(hub_client.push, "qwen3_5", "me/by-a-trainer", 4, "s0", tuned={"base": "me/qwen3_5"})
    assert card_of(hub, "me/by-a-trainer").text.endswith(before.lstrip())
    assert np.array_equal(reader(hub_client.follow_the_card, "me/by-a-trainer"), expected)


def test_a_model_without_s0_is_not_pushed(hub: Hub, author: Process) -> None:
    with pytest.raises(ValueError, match="FalconH1ForCausalLM has no S0 adapter to push"):
        author(hub_client.push_plain, "falcon_h1", "me/plain")
    assert "me/plain" not in hub.repositories
