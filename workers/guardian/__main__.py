"""`python -m workers.guardian`."""

from shared.service import main
from workers.guardian.admit import Guardian

if __name__ == "__main__":
    main(Guardian)
