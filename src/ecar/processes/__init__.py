"""Several processes under torchrun: who is who, who stalls, and signals that end them."""
