"""What is taken for a secret, and what is not."""

import pytest

from pipelines.rendered_text import check_text, check_values

HARMLESS = [
    "tokenize.name=/mnt/userrep/tokenizer.json",
    "pretrain.tokens_per_batch=4096",
    "registry.example/userrep@sha256:" + "0a" * 32,
    "s3://bucket/raw@2026",
    "http://mlflow.userrep.svc:5000/@home",
    "~/.ray/auth_token",
    "user_embeddings@champion",
    "secret-keeper",
]
SECRETS = [
    "http://me:hunter2@mlflow",
    "https://hunter2@mlflow/x",
    "postgresql+psycopg://mlflow:hunter2@postgres/mlflow",
    "RAY_AUTH_TOKEN=hunter2",
    "--password=hunter2",
    "aws_secret_access_key: hunter2",
    "MLFLOW_TRACKING_PASSWORD = hunter2",
    "x?access_token=hunter2",
    "ASIAABCDEFGHIJKLMNOP",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_are_taken(text: str) -> None:
    check_values({"a": [{"b": text}]})


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"secret|credentials") as caught:
        check_values({"a": [{"b": text}]})
    assert "hunter2" not in str(caught.value)
    assert text not in str(caught.value)


def test_line_breaks_are_refused() -> None:
    with pytest.raises(ValueError, match="line break"):
        check_text("a\nb")
