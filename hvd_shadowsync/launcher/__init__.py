"""What `shadowrun` is made of: the command, the MPI at hand, and a launcher that is supervised."""
