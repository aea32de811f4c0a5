"""`python -m mtml_kernels.doctor`."""

from mtml_kernels.doctor.probes import command

if __name__ == "__main__":
    command()
