"""Somebody else's Hydra app, laid out as lightning-hydra-template is: callbacks in a group."""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="foreign_configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    assert "torch" not in sys.modules, "composing must not load torch"
    from foreign_parts import BlobData, Blobs
    from hydra.utils import instantiate
    from lightning.pytorch import Trainer

    callbacks = [
        instantiate(node)
        for node in cfg.callbacks.values()
        if isinstance(node, DictConfig) and "_target_" in node
    ]
    trainer = Trainer(callbacks=callbacks, **cfg.trainer)
    trainer.validate(Blobs(), BlobData(), verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print("METRICS", sorted(metrics), [type(callback).__name__ for callback in callbacks])
    return metrics["val/miou_refined"]


if __name__ == "__main__":
    main()
