"""The smallest MCP server that shows what the laboratory must support. Standard library only; it is run as a script.

One tool, `echo`. Each line written to the FIFO named by PROBE_FIFO is posted to the messaging socket of the client
that started this process: one JSON line after a line with the token. What is posted wakes an idle session.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from typing import Any

ECHO = {
    "name": "echo",
    "description": "Say a text back.",
    "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a request, or None for a method this server does not have."""
    if method == "initialize":
        version = params["protocolVersion"]
        about = {"name": "probe", "version": "1"}
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
    if method == "tools/list":
        return {"tools": [ECHO]}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": f"echo: {params['arguments']['text']}"}]}
    if method == "ping":
        return {}
    return None


def serve() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or "method" not in message:
            continue  # a notification, or an answer to nothing we asked
        response: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        result = answer(message["method"], message.get("params", {}))
        if result is None:
            response["error"] = {"code": -32601, "message": f"no method {message['method']}"}
        else:
            response["result"] = result
        print(json.dumps(response), flush=True)


def relay(fifo: str) -> None:
    while True:
        with open(fifo, encoding="utf-8") as lines:
            for line in lines:
                post(line.rstrip("\n"))


def post(text: str) -> None:
    content = f'<cross-session-message from="probe:lab" from-name="lab">\n{text}\n</cross-session-message>'
    message = {"type": "user", "message": {"role": "user", "content": content}, "from": "probe:lab"}
    token = {"type": "auth", "token": os.environ["CLAUDE_CODE_MESSAGING_TOKEN"]}
    with socket.socket(socket.AF_UNIX) as inbox:
        inbox.settimeout(5)
        inbox.connect(os.environ["CLAUDE_CODE_MESSAGING_SOCKET"])
        inbox.sendall(f"{json.dumps(token)}\n{json.dumps(message)}\n".encode())


if __name__ == "__main__":
    if fifo := os.environ.get("PROBE_FIFO"):
        threading.Thread(target=relay, args=[fifo], daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # how the client ends its servers
        serve()
