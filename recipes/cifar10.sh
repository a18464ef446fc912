#!/bin/sh
# The bundled model "cifar10": class-conditional photographs, 32x32, 4.9 M parameters.
#
#     sh recipes/cifar10.sh train.parquet test.parquet
#
# The data are in the forms that `ecar train` takes (Hub ids, folders, parquet files). Every command resumes where it
# was stopped, and one that is done does nothing, so the whole file may be run again. Times are those of the run that
# was published. Needs: pip install ".[all]".
set -eu
train=$1 test=$2
runs=${RUNS:-runs/cifar10}

# Autoencoder: 8 channels at 8x8. 39 minutes of a CPU core.
ecar tokenizer --data "$train" --out "$runs/tokenizer" --channels 8 --max-steps 2400
ecar encode --data "$train" --tokenizer "$runs/tokenizer" --flip --out "$runs/latents"

# Model: 49.6 epochs, six minutes of an H100 beside seven other trainings.
# (That run began for 4,200 steps and was resumed at 746 for 4,846; the learning rate was flat there. Its
# warm-up took 300 steps, where 200 are the rule now; that of the distillation 40.)
ecar train --data "$runs/latents" --flip --out "$runs/model" --preset nano --compile --optimizer muon --lr 2e-3 \
    --seed 2 --stages 0.7 1 --batch-size 512 --stage-share 1 1 --max-steps 4846 \
    --decay 0.4 --ema 0.99 0.999

# The same latents, a better decoder: 53 minutes, then 9 with an adversary, of a CPU core.
ecar tokenizer --data "$train" --init-from "$runs/tokenizer" --freeze-encoder --out "$runs/decoder" --channels 8 \
    --scale-consistency 0 --perceptual 1 --lr 1e-3 --batch-size 128 --max-steps 3000
ecar tokenizer --data "$train" --init-from "$runs/decoder" --freeze-encoder --out "$runs/sharp" \
    --scale-consistency 0 --perceptual 1 --lr 1e-4 --batch-size 128 --max-steps 400 --adversarial 0.2

# Neon: five trainings on own samples, three of both stages and two of the last. Each a minute of an H200, or half an
# hour of a CPU core.
self_train() {
    out=$1 seed=$2 samples=$3 fine=$4; shift 4
    ecar train --init-from "$runs/model/final" --data "self:$samples:8+$fine" --seed "$seed" \
        --out "$runs/$out" --optimizer muon --lr 3e-4 --max-steps 400 --batch-size 256 --decay 0.8 \
        --ema 0.97 "$@"
}
self_train both13 13 24576 16
self_train both20 20 16384 12
self_train both21 21 16384 12
self_train last10 10 24576 16 --stage-share 0 1
self_train last11 11 24576 16 --stage-share 0 1
[ -d "$runs/half" ] || ecar neon "$runs/model/final" --scale 0.99 --out "$runs/half" \
    --trained "$runs/both13/final" "$runs/both20/final" "$runs/both21/final"
[ -d "$runs/away" ] || ecar neon "$runs/half" --base "$runs/model/final" --scale 1.6 --out "$runs/away" \
    --trained "$runs/last10/final" "$runs/last11/final"

# Guidance distilled: one pass a step. 24 minutes of a CPU core.
ecar train --init-from "$runs/away" --distill 1.3@0.5 2@0.25 \
    --data "$runs/latents" --flip --out "$runs/student" --compile --optimizer muon --lr 1e-3 --decay 0.6 \
    --batch-size 64 --stage-share 1 1 --max-steps 1200 --ema 0.98

# The folder of the model, in float16, with its default steps; the critic beside it.
python recipes/bundle.py --model "$runs/student/final" --decoder "$runs/sharp" --steps 4 3 --solver ab2 \
    --out "$runs/cifar10"
[ -f "$runs/cifar10/critic.safetensors" ] ||
    ecar critic "$runs/cifar10" --data "$train" --dtype bf16 --compile --out "$runs/cifar10/critic.safetensors"

# The record: results/cifar10/evaluate.json.
ecar evaluate --model "$runs/cifar10" --data "$test" --train-data "$train" --classifier "$runs/judge.safetensors" \
    --num 10000 --dtype bf16 --out "$runs/evaluate.json"
