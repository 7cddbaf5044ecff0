"""`python -m workers.provider`."""

from shared.service import main
from workers.provider.call import Provider

if __name__ == "__main__":
    main(Provider)
