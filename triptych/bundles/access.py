"""Whether a repository refused to give a file because of who asks, and what the user can do about it."""

from __future__ import annotations

_REFUSED = (401, 403)


def refusal(error: BaseException, repository: str) -> int | None:
    """The status 401 or 403 with which the Hub refused ``repository`` to the caller; None where that is not why an
    exception, or one that led to it, was raised.

    A repository answers so when its licence was not accepted, when nobody is signed in, and when it does not exist. A
    refusal by another address, as of a link that has expired, is none: to try again helps there.
    """
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if response is not None and response.status_code in _REFUSED:
            return response.status_code if f"/{repository}/" in f"{response.request.url}/" else None
        seen = seen.__cause__ or seen.__context__
    return None


def how_to_enter(repository: str) -> str:
    """The remedy for a gated repository ``owner/name``, without a full stop."""
    return (
        f"accept its licence at huggingface.co/{repository} and sign in with `hf auth login` (or set HF_TOKEN to a "
        "token that may read it)"
    )
