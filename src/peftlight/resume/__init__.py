"""`fit --resume`: which run is continued, by which configuration, and which changes of it are refused."""
