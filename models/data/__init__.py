"""Files that ship with the package: the QM9 network and the QM9 molecules. See README.md beside this file."""
