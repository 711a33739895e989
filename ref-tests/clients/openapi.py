"""The running server against its own /openapi.json: schemathesis makes requests, valid and not, and checks the answers.

usage: openapi.py http://HOST:PORT [SECONDS]
What is checked: no 500, answers of the status, type and shape that the document says, other methods refused; requests that
the document does not allow (wrong types, values out of range, fields that are unknown where they may not be) refused. Not
that all it allows are served: models must be there, token ids in their vocabularies, templates sound. Models are not made,
copied or removed by it. Answers are short: a schema can ask for a number that never ends.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import schemathesis

CHECKS = ("not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,"
          "negative_data_rejection")
EXCEPT = "^/api/(create|copy|delete)$"
TALKERS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion")
TOKENS = 32


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
        if type(body.get(name)) is int and not 0 <= body[name] <= TOKENS:
            body[name] = TOKENS
    options = body.get("options")
    if case.path in TALKERS and (options is None or isinstance(options, dict)):
        body["options"] = {**(options or {}), "num_predict": TOKENS}


def main():
    base = sys.argv[1]
    seconds = sys.argv[2] if len(sys.argv) > 2 else "40"
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{base}/openapi.json", "--checks", CHECKS,
               "--max-time", seconds, "--max-examples", "40", "--request-timeout", "20", "--continue-on-failure",
               "--generation-deterministic", "--suppress-health-check", "all", "--exclude-path-regex", EXCEPT]
    # This file is the hooks, too.
    here = Path(__file__).resolve()
    env = {**os.environ, "SCHEMATHESIS_HOOKS": here.stem, "PYTHONPATH": str(here.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    # It keeps notes where it runs.
    with tempfile.TemporaryDirectory() as notes:
        sys.exit(subprocess.run(command, cwd=notes, env=env).returncode)


if __name__ == "__main__":
    main()
