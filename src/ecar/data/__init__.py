"""Data: images from folders, parquet or the Hub; latent tables; the order of training."""
