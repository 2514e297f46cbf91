"""Programs as SLURM jobs, through submitit: submitting, running on the nodes, stopping and going on, watching."""
