"""One request to a server over HTTP, with the standard library alone: it runs in the servers' environments too."""

import json
import urllib.request
from typing import Any


def ask(address: str, path: str, values: dict[str, Any]) -> Any:
    """The answer to a POST: its JSON, or the text of a stream.

    Raises:
        urllib.error.URLError: the server refused, or is not there.
    """
    body = json.dumps(values).encode()
    sent = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=600) as answer:
        text = answer.read().decode()
    return text if values.get("stream") else json.loads(text)


def events(stream: str) -> list[dict[str, Any]]:
    """The events of a stream, without the word that ends it."""
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
