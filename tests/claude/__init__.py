"""A laboratory for the real Claude Code client: no account, no network, only loopback.

`fetch` gets the pinned client through npm · `model_api` stands in for the model and keeps what it was shown ·
`client` runs the client, headless or in a `terminal` (tmux) · `processes` ends what a run started, and only that ·
`conftest` gives tests the fixture `new_claude`. `test_lab` shows how each is used, with the server in `probe_server`.
"""
