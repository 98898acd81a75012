"""One file per question; results are committed in results/. Run with ./dev bench NAME."""
