"""The text table of an evaluation."""

from tiny_tasks import CLASSES, CPU, TRANSFORMS, decided_network, task_data

from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.evaluation.tables import table


def test_the_table_has_a_row_for_each_task_their_mean_and_confusions():
    model = decided_network()
    results = {name: evaluate(model, task_data(name), "val", TRANSFORMS, CPU) for name in CLASSES}
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["task", "many", "few", "mean"]
    assert f"{(results['many']['top1'] + results['few']['top1']) / 2:.1f}" in lines[3]
    assert "of 6" in lines[1] and f"{results['many']['top1_low']:.1f} - " in lines[1]
    worst = results["many"]["confusions"][0]
    assert f"{worst['true']} -> {worst['predicted']} {worst['count']}x" in lines[-2]
