#!/bin/sh
# DiT beside "butterflies" at 256x256: the same latents in the same order, the same training FLOPs, the same decoder.
#
#     sh recipes/study_256.sh TRAIN VALIDATION
#
# After recipes/butterflies.sh, whose folder it goes on in. DiT takes 100 minutes of a CPU core with
# bfloat16; a curve of 1,000 samples a setting an hour. Needs: pip install ".[all]" stlpips-pytorch.
set -eu
train=$1 validation=$2
runs=${RUNS:-runs/butterflies}
decoder=src/ecar/bundled/butterflies/tokenizer

# As many steps as cost the training FLOPs of "butterflies" (1.4e15). All blocks of a DiT are in its head.
ecar train --data "$runs/latents" --flip --out "$runs/dit" --resolution 256 --preset dit-256x4x1+6/2 \
    --compile --optimizer muon --lr 2e-3 --batch-size 112 --max-steps 5588 --decay 0.4 --ema 0.99 0.998

python recipes/bundle.py --model "$runs/dit/final" --decoder "$decoder" --out "$runs/dit_bundled"

# Distances to the training photographs, of which there are enough; the floor is the held-out ones.
curve() {
    out=$1; shift
    python benchmarks/curve.py --data "$train" --train-data "$validation" --out "$runs/$out.jsonl" "$@"
}
# Guidance, by samples of other seeds.
curve dit_guidance --model "$runs/dit_bundled" --num 300 --seed 10000 --settings 10:2 10:3 10:4.5 10:3:ab2:0.3
curve ecar --model butterflies --vgg --num 1000 --settings 2,2:3,5 3,2:3,5 4,3:3,5 6,4:3,5 12,8:3,5
curve dit --model "$runs/dit_bundled" --vgg --num 1000 --settings 5:3.5 10:3.5 25:3.5 50:3.5

# Seconds need a quiet machine.
python benchmarks/seconds.py --ecar "$runs/ecar.jsonl" --ecar-model butterflies --dit "$runs/dit.jsonl" \
    --dit-model "$runs/dit_bundled" --images 16 --out "$runs/seconds.json"
python benchmarks/compare.py --ecar "$runs/ecar.jsonl" --dit "$runs/dit.jsonl" --seconds "$runs/seconds.json" \
    --name comparison --out results/butterflies_dit
python benchmarks/side_by_side.py --systems "ECAR=butterflies=6,4:3,5" "DiT=$runs/dit_bundled=25:3.5" \
    --data "$validation" --classes 6 --per-class 2 --out results/butterflies_dit/side_by_side.jpg

# Holes in held-out photographs, by the same replacement of what is known: at the FLOPs of ECAR, and at 50 steps.
for steps in 9 50; do
    python benchmarks/editing.py "$runs/dit_bundled" "$validation" --reference "$train" --reference-num 3000 \
        --num 200 --dtype bf16 --parts holes --steps $steps --guidance 3.5 --out results/butterflies_dit/holes_$steps.json
done
