#!/bin/sh
# The bundled model "fashion": class-conditional grey pictures of clothes, 32x32, 4.9 M parameters.
#
#     sh recipes/fashion.sh                  # idx files of the Debian package dataset-fashion-mnist
#     sh recipes/fashion.sh IDX_FOLDER       # or those of the data set's own page
#
# Every command resumes where it was stopped, and one that is done does nothing, so the whole file may be run again.
# Times are those of the run that was published. Needs: pip install ".[all]".
set -eu
idx=${1:-/usr/share/datasets/fashion-mnist}
runs=${RUNS:-runs/fashion}
data=$runs/data

[ -f "$data/test.parquet" ] || python recipes/fashion_mnist.py --idx "$idx" --out "$data"

# Autoencoder: 8 channels at 8x8. 56 minutes of a CPU core.
ecar tokenizer --data "$data/train.parquet" --out "$runs/tokenizer" --channels 8 --max-steps 2200
ecar encode --data "$data/train.parquet" --tokenizer "$runs/tokenizer" --out "$runs/latents"

# Model: 42.9 epochs, six minutes of an H100 beside three other trainings.
# (That run began for 3,600 steps and was resumed at 811 for 5,025; the learning rate was flat there. Its
# warm-up took 300 steps, where 200 are the rule now.)
ecar train --data "$runs/latents" --out "$runs/model" --preset nano --compile --optimizer muon --lr 2e-3 --seed 2 \
    --stages 0.75 1 --batch-size 512 --stage-share 1 1 --max-steps 5025 --decay 0.4 --ema 0.99 0.999

# The same latents, a better decoder: 40 minutes, then 34 with an adversary, of a CPU core.
ecar tokenizer --data "$data/train.parquet" --init-from "$runs/tokenizer" --freeze-encoder --out "$runs/decoder" \
    --channels 8 --scale-consistency 0 --perceptual 1 --lr 1e-3 --batch-size 128 --max-steps 1700
ecar tokenizer --data "$data/train.parquet" --init-from "$runs/decoder" --freeze-encoder --out "$runs/sharp" \
    --scale-consistency 0 --perceptual 1 --lr 1e-4 --batch-size 128 --max-steps 1600 --adversarial 0.2

# Neon: two trainings of the last stage on own samples, a minute of an H200 each.
for seed in 10 11; do
    ecar train --init-from "$runs/model/final" --data self:24576:8+16 --seed $seed --stage-share 0 1 \
        --out "$runs/last$seed" --optimizer muon --lr 3e-4 --max-steps 400 --batch-size 256 --decay 0.8 \
        --ema 0.97
done
[ -d "$runs/away" ] || ecar neon "$runs/model/final" --scale 2 --out "$runs/away" \
    --trained "$runs/last10/final" "$runs/last11/final"

# The folder of the model, in float16, with its default steps; the critic beside it.
python recipes/bundle.py --model "$runs/away" --decoder "$runs/sharp" --steps 5 3 --out "$runs/fashion"
[ -f "$runs/fashion/critic.safetensors" ] ||
    ecar critic "$runs/fashion" --data "$data/train.parquet" --compile --out "$runs/fashion/critic.safetensors"

# The record: results/fashion/evaluate.json.
ecar evaluate --model "$runs/fashion" --data "$data/test.parquet" --train-data "$data/train.parquet" \
    --classifier "$runs/judge.safetensors" --num 10000 --dtype bf16 --out "$runs/evaluate.json"
