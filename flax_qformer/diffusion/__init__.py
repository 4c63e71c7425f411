"""Stable Diffusion that reads subject vectors: text encoder, UNet, autoencoder, ControlNet, schedulers, pipelines."""
