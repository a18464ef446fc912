"""Ids of the Hub, and what its errors mean. Imports nothing of the package: models, tokenizers and data all ask it."""

from __future__ import annotations

_SHOWN = 200  # letters of the start and of the end of a long reason


def check_repo_id(repo: str) -> None:
    """ValueError unless ``repo`` can be the Hub id OWNER/NAME; nothing is asked for."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no Hub id: {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no Hub id: give OWNER/NAME")


def hub_reason(error: BaseException, kind: str = "model") -> str:
    """One line of what a failed request to the Hub means and what to do.

    Args:
        error: as it came, or as another library wrapped it.
        kind: of the repository: model or dataset.
    """
    from huggingface_hub import errors

    chain: list[BaseException] = []
    known: BaseException | None = error
    while known is not None and known not in chain:
        chain.append(known)
        known = known.__cause__ or known.__context__
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return "the repository has no such revision (a branch, tag or commit after the @)"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return "no such repository there, or a private one (log in: hf auth login)"
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if any(isinstance(e, offline) or "connect" in type(e).__name__.lower() for e in chain):
        flag = "" if kind == "model" else f" --repo-type {kind}"
        return (
            "not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set; where there is a network run "
            f"`hf download OWNER/NAME{flag} --local-dir FOLDER`, copy FOLDER here and give it instead of the id"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Generation" in type(error).__name__ and error.__cause__ is not None:  # datasets hides the reason behind it
        words = " ".join(str(error.__cause__).split())
        reason = words if len(words) < 2 * _SHOWN else f"{words[:_SHOWN]} ... {words[-_SHOWN:]}"
    if "protocol" in type(error).__name__.lower():  # httpx: the other side hung up
        return f"the download broke off ({reason}); run the same again, files that are complete are kept"
    return reason
