#!/bin/sh
# The bundled model "butterflies": class-conditional photographs of 100 species, 256x256.
#
#     sh recipes/butterflies.sh BUTTERFLIES IMAGEWOOF VALIDATION
#
# Training photographs of butterflies and of dogs, and others of butterflies, in the forms that `ecar train` takes
# (Hub ids, folders, parquet files). The dogs are for the autoencoder only, which sees a second kind of photographs.
# Every command resumes where it was stopped. Needs: pip install ".[all]".
set -eu
butterflies=$1 imagewoof=$2 validation=$3
runs=${RUNS:-runs/butterflies}

# Autoencoder: factor 16, 16 channels, latents that bear pooling (two levels).
ecar tokenizer --data "$butterflies" "$imagewoof" --out "$runs/tokenizer" --resolution 256 --crop 128 --factor 16 \
    --patch 4 --channels 16 --widths 128 192 256 --batch-size 12 --optimizer muon --lr 3e-3 --perceptual 0 \
    --scale-levels 2 --latent-noise 0.05 --max-steps 3600 --compile

# In float16, before latents are made with it. This is the bundled tokenizer "photographs".
python recipes/bundle.py --tokenizer "$runs/tokenizer" --out "$runs/photographs"

# The same latents, a sharper decoder, of butterflies alone.
ecar tokenizer --data "$butterflies" --out "$runs/sharp" --init-from "$runs/photographs" --freeze-encoder \
    --resolution 256 --crop 128 --batch-size 12 --scale-consistency 0 --latent-noise 0.05 --perceptual 1 \
    --adversarial 1 --optimizer muon --lr 1e-3 --max-steps 2500

ecar encode --data "$butterflies" --tokenizer "$runs/photographs" --resolution 256 --flip --out "$runs/latents"

# Model: 64 tokens of 2x2 positions in the last stage, 16 in the first, which trains on twice as many images.
ecar train --data "$runs/latents" --flip --out "$runs/model" --resolution 256 --preset 256x4x1+6/2 --stages 2 \
    --stage-share 1 0.5 --compile --optimizer muon --lr 2e-3 --batch-size 112 --max-steps 7300 --decay 0.4 --ema 0.99 0.998

# The folder of the model, in float16, with its default steps; the critic beside it.
python recipes/bundle.py --model "$runs/model/final" --decoder "$runs/sharp" --steps 8 4 --out "$runs/butterflies"
[ -f "$runs/butterflies/critic.safetensors" ] ||
    ecar critic "$runs/butterflies" --data "$butterflies" --compile --out "$runs/butterflies/critic.safetensors"

# The record. There are few validation photographs, so FD is biased: KID counts.
ecar evaluate --model "$runs/butterflies" --data "$validation" --train-data "$butterflies" \
    --num 2000 --allow-small --out "$runs/evaluate.json"
