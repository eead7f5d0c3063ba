"""Values in docs/cluster.md render."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.chart.test_rendering import CUSTOM

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
VALUES = [block for block in BLOCKS if "apiVersion:" not in block]


@pytest.fixture(params=VALUES, ids=lambda block: str(block).splitlines()[0])
def rendered(
    request: pytest.FixtureRequest, chart: SimpleNamespace, tmp_path: Path
) -> list[dict[str, Any]]:
    """Objects rendered from one block of values, with inference enabled."""
    file = tmp_path / "values.yaml"
    file.write_text(request.param)
    bucket = [] if "\ns3:" in f"\n{request.param}" else ["--set=s3.bucket=my-bucket"]
    serving = "--set=inference.enabled=true"
    flags = [f"--values={file}", serving, *bucket, f"--kube-version={chart.newest}"]
    done = chart.run_helm("template", "tita", str(chart.path), *flags)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if o]


def test_values_in_cluster_md_render(
    chart: SimpleNamespace, rendered: list[dict[str, Any]]
) -> None:
    for o in rendered:
        if o["kind"] not in CUSTOM:
            kubernetes_validate.validate(o, chart.newest, strict=True)
    benchmark = chart.find(rendered, "CronJob", "tita-benchmark")["spec"]["jobTemplate"]
    assert "gke-accelerator" not in str(benchmark)
    assert "queue-name" not in str(benchmark)
