"""Stored sessions: whole at every instant, checked to the last byte, readable by PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from ponderttt.errors import ConflictError, DamagedSessionError, NotFoundError, StoreError
from ponderttt.sessions.codec import OPTIMIZER_FILE, STATE_FILES
from ponderttt.sessions.files import LocalFiles, open_files
from ponderttt.sessions.record import RECORD_FILE, Facts, RecordError
from ponderttt.sessions.store import SessionStore, directory_of
from tests.ponderttt.sessions import stores
from tests.ponderttt.sessions.stores import Crash, CrashingFiles


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> SessionStore:
    """An empty store on local disk, and one on another file system of fsspec."""
    url = str(tmp_path / "store") if request.param == "local" else stores.memory_url()
    return stores.make_store(tiny_llama_dir, url)


@pytest.fixture
def local(tiny_llama_dir: Path, tmp_path: Path) -> SessionStore:
    return stores.make_store(tiny_llama_dir, tmp_path / "store")


def commit(store: SessionStore, directory: Path, *versions: int, name: str = "repo") -> None:
    for version in versions:
        facts = stores.make_facts(store.codec, name, version)
        store.commit(facts, stores.make_state(directory, version))


# --- writing and reading --------------------------------------------------------------------------


def test_session_comes_back_bit_by_bit(store: SessionStore, tiny_llama_dir: Path) -> None:
    facts = stores.make_facts(store.codec, version=7)
    state = stores.make_state(tiny_llama_dir, 3)
    written = store.commit(facts, state)
    loaded = store.load("repo")
    assert stores.same(loaded.state, state)
    assert loaded.facts.model_copy(update={"files": {}}) == facts
    assert (loaded.version, loaded.kept, loaded.damaged) == (7, (7,), ())
    assert written.kept == (7,)
    assert written.nbytes > loaded.nbytes > 12 * store.codec.layout.size


def test_moments_of_a_session_that_has_learned_nothing_take_no_space(
    local: SessionStore, tiny_llama_dir: Path
) -> None:
    state = stores.make_bank(tiny_llama_dir).fresh_state()
    local.commit(stores.make_facts(local.codec), state)
    assert local.load("repo").facts.files[OPTIMIZER_FILE].bytes < 200
    assert stores.same(local.load("repo").state, state)


def test_record_alone_is_replaced_without_a_new_version(
    store: SessionStore, tiny_llama_dir: Path
) -> None:
    commit(store, tiny_llama_dir, 1, 2)
    facts = stores.make_facts(store.codec, version=2).model_copy(update={"chunks": 99})
    assert store.commit(facts, None).nbytes < 2000
    loaded = store.load("repo")
    assert (loaded.facts.chunks, loaded.kept) == (99, (1, 2))
    assert stores.same(loaded.state, stores.make_state(tiny_llama_dir, 2))


def test_record_alone_of_a_version_that_is_not_stored_is_refused(store: SessionStore) -> None:
    with pytest.raises(RecordError, match="is missing"):
        store.commit(stores.make_facts(store.codec), None)
    assert not store.exists("repo")


def test_version_that_another_server_has_stored_is_not_replaced(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a server stands still after it has checked its lease, and goes on too late."""
    mine = stores.make_store(tiny_llama_dir, stores.memory_url())
    theirs = SessionStore(open_files(mine.files.url), mine.codec, 3)
    commit(theirs, tiny_llama_dir, 1)
    late = stores.make_state(tiny_llama_dir, 99)
    with pytest.raises(ConflictError, match="version 1 of session 'repo' was stored by another"):
        mine.commit(stores.make_facts(mine.codec), late)
    # One's own second attempt is no other server's.
    commit(theirs, tiny_llama_dir, 1, 2)
    commit(mine, tiny_llama_dir, 2)


def test_last_versions_and_snapshots_are_kept(store: SessionStore, tiny_llama_dir: Path) -> None:
    for version in range(1, 9):
        facts = stores.make_facts(store.codec, version=version)
        pinned = facts.model_copy(update={"pinned": [2] if version >= 2 else []})
        kept = store.commit(pinned, stores.make_state(tiny_llama_dir, version)).kept
    assert kept == (2, 6, 7, 8)
    assert stores.same(store.load("repo", 6).state, stores.make_state(tiny_llama_dir, 6))
    with pytest.raises(NotFoundError, match="version 5 of session 'repo' is not kept; kept are 2"):
        store.load("repo", 5)


def test_unknown_session_is_not_found(store: SessionStore) -> None:
    assert not store.exists("repo")
    for read in (store.load, store.peek):
        with pytest.raises(NotFoundError, match="'repo' does not exist"):
            read("repo")


def test_listing_has_every_session_by_age(store: SessionStore, tiny_llama_dir: Path) -> None:
    for age, name in enumerate(("b", "a", "C", "c")):
        facts = stores.make_facts(store.codec, name).model_copy(update={"created": float(age)})
        store.commit(facts, stores.make_state(tiny_llama_dir, 1))
    listing = store.listing()
    assert [facts.id for facts, _ in listing.readable] == ["b", "a", "C", "c"]
    assert listing.unreadable == {}


def test_deleted_session_leaves_nothing(local: SessionStore, tiny_llama_dir: Path) -> None:
    commit(local, tiny_llama_dir, 1, 2)
    local.delete("repo")
    local.delete("repo")
    assert local.files.names() == []
    assert not local.exists("repo")


# Of peft, about transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_version_directory_as_it_is(tiny_llama_dir: Path, tmp_path: Path) -> None:
    store = stores.make_store(tiny_llama_dir, tmp_path)
    state = stores.make_state(tiny_llama_dir, 1)
    store.commit(stores.make_facts(store.codec, version=42), state)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    adapted = PeftModel.from_pretrained(base, tmp_path / "repo" / "v00000042")
    ours = dict(adapted.named_parameters())
    for (layer, module), (a, b) in store.codec._layout.views(state.weights[None]).items():
        place = f"base_model.model.model.layers.{layer}.{module}"
        assert torch.equal(ours[f"{place}.lora_A.default.weight"], a[0])
        assert torch.equal(ours[f"{place}.lora_B.default.weight"], b[0])


# --- names ----------------------------------------------------------------------------------------


def test_names_that_a_file_system_may_confuse_have_directories_of_their_own() -> None:
    names = ["repo", "Repo", "REPO", "repo.", "a..b", "v00000001", "9", "x" * 128, "X" * 128]
    directories = [directory_of(name) for name in names]
    assert len({directory.lower().rstrip(".") for directory in directories}) == len(names)
    assert directory_of("my-repo") == "my-repo"
    assert all("/" not in d and not d.startswith((".", "~")) and len(d) < 140 for d in directories)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../repo", "a\0", "~locks", "/etc", "a\n"])
def test_name_that_is_no_id_never_becomes_a_path(
    local: SessionStore, tiny_llama_dir: Path, name: str
) -> None:
    commit(local, tiny_llama_dir, 1)
    acts: list[Callable[[str], object]] = [local.exists, local.peek, local.load, local.delete]
    for act in acts:
        with pytest.raises(NotFoundError, match="does not exist"):
            act(name)
    assert local.exists("repo")


def test_foreign_directories_are_no_sessions(local: SessionStore, tiny_llama_dir: Path) -> None:
    commit(local, tiny_llama_dir, 1)
    for name in (".git", "~locks", "with space", "Upper", "repo~12345678", "-dash"):
        shutil.copytree(
            Path(local.files.url) / "repo", Path(local.files.url) / name, dirs_exist_ok=True
        )
    listing = local.listing()
    assert [facts.id for facts, _ in listing.readable] == ["repo"]
    assert listing.unreadable == {}


def test_session_moved_to_another_name_is_refused(
    local: SessionStore, tiny_llama_dir: Path
) -> None:
    commit(local, tiny_llama_dir, 1, name="theirs")
    root = Path(local.files.url)
    shutil.copytree(root / "theirs", root / "mine")
    with pytest.raises(DamagedSessionError, match="is of 'theirs'"):
        local.load("mine")


# --- crashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_crash_at_every_change_of_a_commit_leaves_the_last_commit(
    kind: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    crashes = 0
    while True:
        url = str(tmp_path / str(crashes)) if kind == "local" else stores.memory_url()
        good = stores.make_store(tiny_llama_dir, url)
        commit(good, tiny_llama_dir, 1, 2, 3)
        files = CrashingFiles(open_files(url), at=crashes)
        try:
            commit(SessionStore(files, good.codec, 3), tiny_llama_dir, 4)
        except Crash:
            loaded = good.load("repo")
            assert loaded.facts.version in (3, 4)
            assert loaded.damaged == ()
            wanted = stores.make_state(tiny_llama_dir, loaded.facts.version)
            assert stores.same(loaded.state, wanted)
            # And the next commit goes through.
            commit(good, tiny_llama_dir, 5)
            assert good.load("repo").facts.version == 5
            assert len(good.load("repo").kept) == 3
            crashes += 1
        else:
            break
    assert crashes > 10


def test_crash_at_every_change_of_a_first_commit_leaves_all_or_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for at in range(7):
        good = stores.make_store(tiny_llama_dir, tmp_path / str(at))
        files = CrashingFiles(open_files(str(tmp_path / str(at))), at=at)
        with pytest.raises(Crash):
            commit(SessionStore(files, good.codec, 3), tiny_llama_dir, 0)
        assert not good.exists("repo")
        assert good.listing().readable == []
        assert good.listing().unreadable == {}


def test_crash_at_every_change_of_a_deletion_leaves_all_or_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    at = 0
    while True:
        good = stores.make_store(tiny_llama_dir, tmp_path / str(at))
        commit(good, tiny_llama_dir, 1, 2)
        files = CrashingFiles(open_files(str(tmp_path / str(at))), at=at)
        try:
            SessionStore(files, good.codec, 3).delete("repo")
        except Crash:
            assert good.exists("repo") == (at == 0)
            listing = good.listing()
            found = [facts.version for facts, _ in listing.readable]
            for name in listing.deleted:
                good.delete(name)
            assert found == ([2] if at == 0 else [])
            # An empty directory may remain.
            assert bool(good.files.names("repo")) == (at == 0)
            at += 1
        else:
            break
    assert at > 10


# --- damage ---------------------------------------------------------------------------------------


def spoil(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_versions(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2 of a session, to be copied and spoilt."""
    root = tmp_path_factory.mktemp("two-versions")
    commit(stores.make_store(tiny_llama_dir, root), tiny_llama_dir, 1, 2)
    return root


def spoilt_copy(original: Path, root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(original, root)
    return root / "repo" / "v00000002"


def assert_fell_back(directory: Path, root: Path) -> None:
    loaded = stores.make_store(directory, root).load("repo")
    assert loaded.facts.version == 1
    assert stores.same(loaded.state, stores.make_state(directory, 1))
    assert len(loaded.damaged) == 1
    # The number of the version that was lost is not used again.
    assert loaded.version == 3


@given(
    name=st.sampled_from([*STATE_FILES, RECORD_FILE]),
    at=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
)
@settings(max_examples=150)
def test_flipped_bit_anywhere_is_found_and_the_version_before_is_used(
    two_versions: Path, tiny_llama_dir: Path, name: str, at: int, bit: int
) -> None:
    root = two_versions.parent / "flipped"
    spoil(spoilt_copy(two_versions, root) / name, at, bit)
    assert_fell_back(tiny_llama_dir, root)


def test_every_byte_of_the_record_matters(two_versions: Path, tiny_llama_dir: Path) -> None:
    text = (two_versions / "repo" / "v00000002" / RECORD_FILE).read_bytes()
    Facts.from_json(text)
    for at in range(len(text)):
        changed = bytes([text[at] ^ 1])
        with pytest.raises(RecordError):
            Facts.from_json(text[:at] + changed + text[at + 1 :])


@given(name=st.sampled_from([*STATE_FILES, RECORD_FILE]), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40)
def test_truncated_file_is_found_and_the_version_before_is_used(
    two_versions: Path, tiny_llama_dir: Path, name: str, share: float
) -> None:
    root = two_versions.parent / "truncated"
    path = spoilt_copy(two_versions, root) / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_fell_back(tiny_llama_dir, root)


@pytest.mark.parametrize("name", STATE_FILES)
def test_missing_file_is_found(two_versions: Path, tiny_llama_dir: Path, name: str) -> None:
    root = two_versions.parent / "missing"
    (spoilt_copy(two_versions, root) / name).unlink()
    assert_fell_back(tiny_llama_dir, root)


def test_version_that_goes_while_it_is_read_is_not_kept_rather_than_damaged(
    local: SessionStore, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(local, tiny_llama_dir, 1, 2, 3)
    read = local.files.read

    def late(path: str) -> bytes | None:
        if "v00000001" in path and not path.endswith(RECORD_FILE):
            commit(local, tiny_llama_dir, 4)
        return read(path)

    monkeypatch.setattr(local.files, "read", late)
    with pytest.raises(NotFoundError, match=r"version 1 .* not kept; kept are 2, 3, 4"):
        local.load("repo", 1)


def test_session_without_a_good_version_is_reported_and_can_be_deleted(
    local: SessionStore, tiny_llama_dir: Path
) -> None:
    commit(local, tiny_llama_dir, 1, 2)
    commit(local, tiny_llama_dir, 1, name="other")
    for version in (1, 2):
        spoil(Path(local.files.url) / "repo" / f"v{version:08d}" / RECORD_FILE, 5, 0)
    with pytest.raises(DamagedSessionError, match=r"'repo' can't be read .*backup, or delete it"):
        local.load("repo")
    listing = local.listing()
    assert [facts.id for facts, _ in listing.readable] == ["other"]
    assert list(listing.unreadable) == ["repo"]
    local.delete("repo")
    assert local.listing().unreadable == {}


# --- what a forger might try: checksums that fit, contents that don't -----------------------------


def forge(store: SessionStore, directory: Path, **files: bytes) -> None:
    """Commit a version whose files are these, with matching checksums."""
    contents = store.codec.encode(stores.make_state(directory, 1))
    names = {"weights": "adapter_model.safetensors", "config": "adapter_config.json",
             "optimizer": OPTIMIZER_FILE}  # fmt: skip
    contents |= {names[key]: data for key, data in files.items()}
    encode = store.codec.encode
    store.codec.encode = lambda state: contents  # type: ignore[method-assign]
    try:
        commit(store, directory, 1)
    finally:
        store.codec.encode = encode  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("pickle", "cannot be read"),
        ("nan", "not finite"),
        ("far", "lie .* from fresh ones"),
        ("shape", "has shape"),
        ("moment shape", "first is torch.float32 of shape"),
        ("moment nan", "first has values that are not finite"),
        ("moment negative", "second has values below 0"),
        ("moment unknown", "third is not known"),
        ("step", "step is not a count"),
        ("config", "plain LoRA"),
    ],
)
def test_forged_contents_never_reach_the_bank(
    local: SessionStore, tiny_llama_dir: Path, change: str, complaint: str
) -> None:
    import pickle

    good = local.codec.encode(stores.make_state(tiny_llama_dir, 1))
    weights = load(good["adapter_model.safetensors"])
    moments = load(good[OPTIMIZER_FILE])
    key = min(weights)
    match change:
        case "pickle":
            forge(local, tiny_llama_dir, weights=pickle.dumps(weights))
        case "nan":
            weights[key][0, 0] = float("nan")
            forge(local, tiny_llama_dir, weights=save(weights))
        case "far":
            weights[key] += 1e4
            forge(local, tiny_llama_dir, weights=save(weights))
        case "shape":
            weights[key] = weights[key].T.contiguous()
            forge(local, tiny_llama_dir, weights=save(weights))
        case "moment shape":
            forge(local, tiny_llama_dir, optimizer=save(moments | {"first": torch.ones(3)}))
        case "moment nan":
            moments["first"][5] = float("inf")
            forge(local, tiny_llama_dir, optimizer=save(moments))
        case "moment negative":
            forge(local, tiny_llama_dir, optimizer=save(moments | {"second": -moments["second"]}))
        case "moment unknown":
            forge(local, tiny_llama_dir, optimizer=save(moments | {"third": torch.ones(1)}))
        case "step":
            forge(local, tiny_llama_dir, optimizer=save(moments | {"step": torch.tensor([-1])}))
        case "config":
            config = json.loads(good["adapter_config.json"]) | {"use_dora": True}
            forge(local, tiny_llama_dir, config=json.dumps(config).encode())
    with pytest.raises(DamagedSessionError, match=complaint):
        local.load("repo")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", -1),
        ("chunks", "many"),
        ("learned", ["x" * 65]),
        ("loss_ema", None),
        ("ledger", {}),
        ("owner", 5),
        ("format", 2),
        ("extra", 1),
    ],
)
def test_forged_record_names_the_field(local: SessionStore, field: str, value: object) -> None:
    from ponderttt.sessions.record import _spell

    content = stores.make_facts(local.codec).model_dump(mode="json") | {field: value}
    with pytest.raises(RecordError, match=field):
        Facts.from_json(_spell(content))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"checksum": 1}'])
def test_anything_else_is_no_record(text: bytes) -> None:
    with pytest.raises(RecordError):
        Facts.from_json(text)


def test_session_of_another_model_is_refused_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    commit(stores.make_store(tiny_llama_dir, tmp_path), tiny_llama_dir, 1)
    other = SessionStore(
        LocalFiles(tmp_path), stores.make_codec(tiny_llama_dir, model="another"), 3
    )
    with pytest.raises(DamagedSessionError, match=r"made for the model 'tiny'.*serves 'another'"):
        other.load("repo")
    assert list(other.listing().unreadable) == ["repo"]


def test_read_error_is_not_taken_for_damage(tiny_llama_dir: Path, tmp_path: Path) -> None:
    import errno

    files = stores.FaultyFiles(tmp_path)
    store = SessionStore(files, stores.make_codec(tiny_llama_dir), 3)
    commit(store, tiny_llama_dir, 1, 2)
    files.faults.reads = errno.EIO
    # Going back for a fault that may pass would lose what the session has learned.
    with pytest.raises(StoreError, match="can't read repo/v00000002"):
        store.load("repo")
    files.faults.reads = None
    assert store.load("repo").facts.version == 2


def test_one_session_that_can_not_be_read_keeps_no_other_from_the_list(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores.make_store(tiny_llama_dir, tmp_path)
    for name in ("good", "bad"):
        facts = stores.make_facts(store.codec, name)
        store.commit(facts, stores.make_state(tiny_llama_dir, 1))
    read = store.files.read

    def fail(path: str) -> bytes | None:
        if path.startswith("bad/"):
            raise StoreError("the disk is worn out")
        return read(path)

    monkeypatch.setattr(store.files, "read", fail)
    listing = store.listing()
    assert [facts.id for facts, _ in listing.readable] == ["good"]
    assert listing.unreadable == {"bad": "the disk is worn out"}
