"""Programs as SLURM jobs, through submitit: submission, execution on the nodes, requeueing, status."""
