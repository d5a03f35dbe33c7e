"""How ranks start: this process alone, several here, or those that torchrun or srun started."""
