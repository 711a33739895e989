"""The running server against its own /openapi.json: schemathesis makes requests, valid and not, and checks the answers.

usage: openapi.py http://HOST:PORT [SECONDS]
What is checked: no 500, answers of the status, type and shape that the document says, other methods refused. Models are not
made, copied or removed by it.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

base = sys.argv[1]
seconds = sys.argv[2] if len(sys.argv) > 2 else "40"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
EXCEPT = "^/api/(create|copy|delete)$"
command = [Path(sys.executable).with_name("schemathesis"), "run", f"{base}/openapi.json", "--checks", CHECKS, "--max-time", seconds,
           "--max-examples", "40", "--request-timeout", "20", "--continue-on-failure", "--generation-deterministic",
           "--suppress-health-check", "all", "--exclude-path-regex", EXCEPT]
# It keeps notes where it runs.
with tempfile.TemporaryDirectory() as notes:
    sys.exit(subprocess.run(command, cwd=notes).returncode)
