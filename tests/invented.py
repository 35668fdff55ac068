"""Run folders made up by formula: what reports are tested on, without a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Json = dict[str, Any]
RATING = {
    "constant": 1.25,
    "user-mean": 1.15,
    "pooled": 1.11,
    "local": 1.105,
    "federated": 1.14,
    "personal": 1.05,
    "federated-linear": 1.13,
    "personal-linear": 1.07,
}
GENERATION = {"base": 31.0, "local": 27.5, "federated": 24.0, "personal": 21.5}
METRICS = {
    "rmse": {"better": "less", "description": "root mean squared error, pooled over test ratings"},
    "mae": {"better": "less", "description": "mean absolute error, pooled"},
    "accuracy": {"better": "more", "description": "share of predictions that round to the rating"},
    "user_rmse": {"better": "less", "description": "RMSE of each user, then the mean"},
    "worst_decile": {"better": "less", "description": "mean over the worst tenth of users"},
    "share_gaining": {"better": "more", "description": "share of users better off than with local"},
}


def interval(value: float, spread: float = 0.02) -> Json:
    return {"value": value, "low": value - spread, "high": value + spread}


def scores(rmse: float) -> Json:
    return {
        "rmse": interval(rmse),
        "mae": interval(0.8 * rmse),
        "accuracy": interval(0.9 - rmse / 2, 0.01),
        "user_rmse": interval(rmse - 0.01),
        "worst_decile": interval(1.6 * rmse, 0.05),
        "share_gaining": interval(0.55, 0.03),
    }


def privacy(epsilon: float | None, trust: str = "local") -> Json:
    return {
        "trust": trust,
        "unit": "record",
        "relation": "add or remove one record",
        "epsilon": epsilon,
        "delta": 1e-5,
        "sampling": "full batch",
        "accountant": "PLD",
        "max_participations": 20,
        "noise": "seeded",
        "noise_multiplier": 3.2,
        "clip_norm": 0.5,
        "steps": 1,
        "rounds": 20,
        "sentence": f"Each device is ({epsilon}, 1e-5)-differentially private per record over 20 rounds.",
    }


def cost(bytes_up: int) -> Json:
    return {
        "wall_s": 131.25,
        "client_rounds": 18860,
        "engine_ms_per_client_round": 5.5,
        "bytes_up_per_client_round": bytes_up,
        "bytes_down_per_client_round": bytes_up,
        "peak_rss_mib": 812.4,
    }


def over_seeds(value: float, seeds: Sequence[int]) -> Json:
    values = [value + 0.01 * i for i in range(len(seeds))]
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    mean = float(np.mean(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "values": values}


def invented_run(
    folder: Path,
    *,
    task: str = "rating",
    seeds: Sequence[int] = (1,),
    epsilon: float | None = 8.0,
    better_by: float = 0.0,
    users: int = 943,
) -> Path:
    """Write a run in which ``personal`` wins against every row; ``better_by`` is taken off every score."""
    folder.mkdir(parents=True, exist_ok=True)
    metric, values = ("rmse", RATING) if task == "rating" else ("perplexity", GENERATION)
    values = {row: value - better_by for row, value in values.items()}
    if task == "rating":
        rows, metrics = {row: scores(value) for row, value in values.items()}, METRICS
    else:
        rows = {row: {"perplexity": interval(value, 0.8)} for row, value in values.items()}
        metrics = {"perplexity": {"better": "less", "description": "exp of the mean loss per response token"}}
    trust = "none" if epsilon is None else "local"
    summary = {
        "schema": 2,
        "scenario": "movielens" if task == "rating" else "speeches",
        "task": task,
        "metric": metric,
        "metrics": metrics,
        "seeds": list(seeds),
        "claim": f"A deployment with these settings would spend ε = {epsilon:g} at δ = 1e-5 per record and device."
        if epsilon is not None
        else "NOT PRIVATE: no noise is added.",
        "stamps": ["noise: seeded", "tuning: not covered"],
        "rows": rows,
        "differences": {
            f"personal - {row}": {metric: interval(values["personal"] - value, 0.004)}
            for row, value in values.items()
            if row != "personal"
        },
        "privacy": privacy(epsilon, trust),
        "cost": cost(50_000),
        "heads": [{"user": "7", "path": "heads/7", "bytes": 102_400, "parity_max_abs": 2.4e-6}],
        "heads_base": {"path": "heads/base.onnx", "bytes": 90_500_000},
        "federation": {
            "method": "ffa-lora",
            "personal_method": "fine-tune",
            "rounds": 20,
            "clients": 943,
            "replies": 18_858,
            "rejected": {"not_finite": 2},
        },
        "data": {"name": "ml-100k", "users": 943, "fit": 71_500, "validation": 8_400, "test": 20_100},
        "resumed": [],
    }
    if task == "rating":
        summary |= {"privacy_linear": privacy(epsilon and epsilon - 0.1, trust), "cost_linear": cost(1_540)}
    if len(seeds) > 1:
        summary["over_seeds"] = {
            row: {name: over_seeds(score["value"], seeds) for name, score in each.items()} for row, each in rows.items()
        }
    rng = np.random.default_rng(5)
    local = rng.gamma(20, 0.055, size=users)
    by_user = {"constant": local + 0.1, "local": local}
    for row, gain in (("personal", 0.05), ("personal-linear", 0.03)):
        by_user[row] = np.abs(local - rng.normal(gain, 0.1, size=users))
    campaigns = (("lora", values["personal"], 50_000),)
    if task == "rating":
        campaigns += (("linear", values["personal-linear"], 1_540),)
    lines = [
        {
            "campaign": campaign,
            "seed": seed,
            "round": number,
            "epsilon": None if epsilon is None else epsilon * (number / 20) ** 0.5,
            "bytes_up": 943 * size * number,
            "bytes_down": 943 * size * number,
            "replies": 943 * (number > 0),
            "rejected": {"not_finite": 1} if number == 4 else {},
            "validation": {
                "federated": floor + 0.1 * 0.8**number + 0.05 + 0.01 * nth,
                "personal": floor + 0.06 * 0.8**number + 0.01 * nth,
            },
        }
        for campaign, floor, size in campaigns
        for nth, seed in enumerate(seeds)
        for number in range(0, 21, 2)  # a scenario may observe every second round
    ]
    run = {
        "scenario_name": summary["scenario"],
        "created": "2031-05-06T07:08:09+00:00",
        "command": "sottovoce simulate simulations/scenarios/movielens.toml",
        "versions": {"sottovoce": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        "seeds": {"run": 1, "bootstrap": 2},
        "machine": {"cpus": 2, "threads": 1, "python": "3.11.9", "platform": "Linux"},
        "commit": None,
    }
    settings = {"data": {"name": "ml-100k"}, "privacy": {"trust": trust, "epsilon": epsilon}, "seed": seeds[0]}
    per_user = {row: (each - better_by).tolist() for row, each in by_user.items()}
    names = [str(n + 1) for n in range(users)]
    for name, content in (
        ("summary.json", summary),
        ("scenario.json", settings),
        ("user_scores.json", {"metric": metric, "users": names, "rows": per_user}),
        ("run.json", run),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return folder


def add_statistics(folder: Path, *, epsilon: float | None = 8.0) -> Path:
    """Give an invented run the rows of the release of item statistics, worse than ``personal`` by .01."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    value = summary["rows"]["personal"]["rmse"]["value"] + 0.01
    summary["rows"] |= {"dp-statistics-shared": scores(value + 0.09), "dp-statistics": scores(value)}
    summary["differences"]["personal - dp-statistics"] = {"rmse": interval(-0.01, 0.004)}
    claim = privacy(epsilon, "none" if epsilon is None else "local")
    summary["privacy_statistics"] = claim | {"sentence": f"Statistics, once: ({epsilon}, 1e-5) per record."}
    path.write_text(json.dumps(summary), encoding="utf-8")
    return folder


def attack(
    *,
    private: float | None = 0.5,
    control: float = 0.6,
    null: float = 0.5,
    tpr: float = 0.01,
    limit: float = 0.0272,
) -> Json:
    """A membership attack on records: the AUC with privacy, without it, and where nothing was trained."""

    def target(auc: float, rate: float = 0.01) -> Json:
        return {"loss": {"auc": interval(auc, 0.01), "tpr": interval(rate, 0.005)}}

    attacked = {"private": target(private, tpr)} if private is not None else {}
    return {
        "members": 900,
        "non_members": 100,
        "users": 30,
        "interval": "bootstrap over users",
        "epsilon": 1.0,
        "delta": 1e-5,
        "tpr_limit": limit,
        "attacked": attacked | {"unprotected": target(control), "untrained": target(null)},
    }


def add_membership(folder: Path, **numbers: Any) -> Path:
    """Give an invented run a membership attack on its records."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["membership"] = {"held_out_share": 0.2, "fpr": 0.01, "records": attack(**numbers)}
    path.write_text(json.dumps(summary), encoding="utf-8")
    return folder


def add_answers(folder: Path) -> Path:
    """Give an invented run answers in words."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    metrics = ("rouge_1", "rouge_2", "rouge_l", "bleu", "meteor", "bertscore")
    rows = {
        row: {name: {"value": 0.2 + 0.01 * i, "low": 0.1, "high": 0.3} for i, name in enumerate(metrics, start=start)}
        for start, row in enumerate(("base", "base + profile", "federated", "personal"))
    }
    summary["answers"] = {
        "per_user": 2,
        "answers": 8,
        "users": 4,
        "longest": 24,
        "metrics": {name: {"description": f"invented <{name}>", "better": "more"} for name in metrics},
        "rows": rows,
        "judge": "rouge-l",
        "win_rates": {"personal - base": {"value": 0.6, "low": 0.4, "high": 0.8}},
    }
    path.write_text(json.dumps(summary), encoding="utf-8")
    return folder
