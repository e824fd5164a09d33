"""The training script of lightning-hydra-template, in short."""

import hydra
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig


def instantiate_callbacks(callbacks_cfg):
    return [
        hydra.utils.instantiate(node)
        for node in callbacks_cfg.values()
        if isinstance(node, DictConfig) and "_target_" in node
    ]


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    seed_everything(cfg.seed)
    datamodule: LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.callbacks)
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=datamodule)
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())
    return trainer.callback_metrics[cfg.optimized_metric].item()


if __name__ == "__main__":
    main()
