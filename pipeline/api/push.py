"""`compress push`: a run's artifact as a model repository of the Hugging Face Hub."""

import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...export.artifact import list_files
from ...export.conversion.transformers_js import write_transformers_js
from ...export.errors import ExportError
from ..errors import JobError, UsageError
from ..runs.artifacts import open_files
from ..runs.files import check_unlocked
from ..runs.folder import REGENERATE, RunFolder

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@dataclass(frozen=True)
class Push:
    """An upload, or what a dry run would upload."""

    repository: str
    files: Mapping[str, int]
    """Sizes in bytes by path in the repository."""
    url: str | None
    """The repository's page; None for a dry run."""


def push(
    run: str | Path,
    repository: str,
    *,
    private: bool = False,
    transformers_js: bool = False,
    dry_run: bool = False,
) -> Push:
    """Upload the artifact of a finished run, with its model card, to the Hugging Face Hub.

    Only files that `export` writes are sent, whatever else is in the folder. Other files of the repository
    are kept.

    Args:
        run: a run folder.
        repository: ``USER/NAME``, which is created if it does not exist.
        private: make a new repository private, and refuse a public one.
        transformers_js: add the files that transformers.js reads, see ``export.conversion.transformers_js``.
        dry_run: list the files, and send nothing.

    Raises:
        UsageError: the run is unfinished or damaged, the repository's name is malformed, there is no access
            token, transformers.js does not support the model, or the repository is public in spite of
            ``private``. Nothing was sent.
        JobError: the upload failed, or another process uses the run folder.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid = re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII) is not None
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UsageError(f"REPO must be USER/NAME of a model on the Hugging Face Hub, got {repository!r}.")
    folder = RunFolder.read(Path(run))
    if missing := folder.unfinished(None):
        raise UsageError(f"{run} is unfinished: {', '.join(missing)} missing. {REGENERATE}")
    check_unlocked(folder.path)
    model = open_files(folder.path)[0]
    artifact = model.path.parent
    assert model.manifest is not None  # it is a folder
    names = list_files(artifact, model.manifest)
    with ExitStack() as stack:
        if transformers_js:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="questpress.")))
            names = _add_transformers_js(artifact, model.manifest, names, scratch)
            artifact = scratch
        files = {name: (artifact / name).stat().st_size for name in names}
        url = None if dry_run else _upload(artifact, names, repository, private=private)
    return Push(repository, files, url)


def _add_transformers_js(
    artifact: Path, manifest: Mapping[str, Any], names: list[str], folder: Path
) -> list[str]:
    """Write the files of transformers.js and copies of the artifact's ``names``; return the names of all."""
    try:
        write_transformers_js(artifact, manifest, folder)
    except ExportError as error:
        raise UsageError(f"--transformers-js: {error}.") from error
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, folder / name)
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _upload(artifact: Path, names: list[str], repository: str, *, private: bool) -> str:
    """Send files of a folder, and return the repository's address. Raises UsageError or JobError."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise UsageError(
            "There is no access token of the Hugging Face Hub. Create one with write permission at "
            "https://huggingface.co/settings/tokens, then run hf auth login, or set HF_TOKEN."
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UsageError(
                f"--private: {repository} exists and is public. Make it private in its settings on the Hub, "
                "or leave out --private."
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=artifact,
            allow_patterns=names,
            commit_message="Upload the artifact of a questpress run",
        )
    except UsageError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError("HF_HUB_OFFLINE is set. Unset it to upload.") from error
    except HfHubHTTPError as error:
        raise JobError(f"{repository}: {_explain(error)}") from error
    except Exception as error:  # the http library behind the hub differs by version, and so do its errors
        if type(error) is ValueError:  # the metadata of a model card that was edited
            raise JobError(f"{repository}: {' '.join(str(error).split())}") from error
        raise JobError(
            f"{repository}: the upload to {api.endpoint} failed ({type(error).__name__}). Check the "
            "connection and run the same command again."
        ) from error
    return f"{api.endpoint}/{repository}"


def _explain(error: "HfHubHTTPError") -> str:
    """Return the reason for which the Hub refused a request."""
    status = error.response.status_code
    if status == 401:
        return "the Hub rejected the access token. Run hf auth login again, or correct HF_TOKEN."
    if status == 403:
        return (
            "the access token has no permission to write there. Use a token with write permission of a user "
            "or organization that owns the repository."
        )
    reason = " ".join(str(error.server_message or "no message").split()).rstrip(".")
    return f"the Hub refused the upload with status {status}: {reason}."
