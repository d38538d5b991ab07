"""What the engine's answers are taken for: words or none yet, its own fault or the client's."""

from __future__ import annotations

import json

import pytest

from keepwarm.gateway.upstream import corrected_blame, is_quiet, reply_headers


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b": ping\n\n",
        b":\n\n:\n\n",
        b'data: {"choices":[],"prompt_progress":{"total":9}}\n\n',
        b"\r\n: x\r\n",
    ],
)
def test_pings_and_progress_are_no_words(raw: bytes) -> None:
    assert is_quiet(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
        b': ping\n\ndata: {"choices":[]}\n\n',
        b'data: {"cho',
        b'data: {"choices":[{"delta":{"content":"\\"prompt_progress\\""}}]}\n\n',
    ],
)
def test_whatever_else_comes_is_a_word(raw: bytes) -> None:
    assert not is_quiet(raw)


def said(message: object) -> bytes:
    return json.dumps({"error": {"code": 500, "message": message, "type": "server_error"}}).encode()


@pytest.mark.parametrize(
    "message",
    [
        "Failed to parse tools: Missing tool type: null",
        "[json.exception.type_error.302] type must be string, but is number",
        "'messages' is required",
        "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101]",
        "image input is not supported - hint: if this is unexpected, you may need an mmproj",
        "audio input is not supported",
        "vector::_M_range_check: __n (which is 99999999) >= this->size() (which is 49152)",
    ],
)
def test_a_request_that_cant_be_read_is_the_clients_fault(message: str) -> None:
    status, raw = corrected_blame(500, said(message))
    error = json.loads(raw)["error"]
    assert (status, error["code"], error["type"]) == (400, 400, "invalid_request_error")
    assert error["message"] == message


@pytest.mark.parametrize(
    "raw",
    [
        said("Compute error."),
        said("Invalid input batch."),
        said("Failed to parse input at pos 12: <tool_call>"),
        said("Context size has been exceeded."),
        said(None),
        b"[]",
        b"<html>",
    ],
)
def test_any_other_failure_stays_one(raw: bytes) -> None:
    assert corrected_blame(500, raw) == (500, raw)


def test_which_pages_may_read_a_reply_isnt_for_the_engine_to_say() -> None:
    told = {"Access-Control-Allow-Origin": "https://evil.example", "X-Model": "m", "Server": "s"}
    assert reply_headers(told) == reply_headers(told, is_unchanged=True) == {"X-Model": "m"}
