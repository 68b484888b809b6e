#!/usr/bin/env bash
# On a machine with a GPU: set up .venv if needed, run the tests and the benchmark that need a GPU, and write
# gpu_check.json. Takes under nine minutes after the set-up.  tools/gpu_check.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device here"'
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
# -rs also lists the tests that were skipped.
timeout 300 "$python" -m pytest -rs -p no:xdist tests/gpu --junitxml "$place/tests.xml" "$@" && tests=0 || tests=$?
timeout 220 "$python" -m moe_bsr benchmark --device cuda --batch 128 --rounds 3 --cases timm full bsr moe_bsr --json \
    > "$place/benchmark.json" && benchmark=0 || benchmark=$?
"$python" - "$place" "$tests" "$benchmark" > gpu_check.json <<'PYTHON'
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import torch

place, tests, benchmark = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def outcome(case: xml.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


cases = xml.parse(place / "tests.xml").iter("testcase") if (place / "tests.xml").exists() else []
text = (place / "benchmark.json").read_text()
told = {
    "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "tests_status": tests,
    "tests": {f"{case.get('classname')}.{case.get('name')}": [outcome(case), float(case.get("time"))] for case in cases},
    "benchmark_status": benchmark,
    "benchmark": json.loads(text) if benchmark == 0 else text,
}
print(json.dumps(told, indent=1))
PYTHON
echo "gpu_check.json written; exit status of the tests: $tests, of the benchmark: $benchmark"
exit $((tests || benchmark))
