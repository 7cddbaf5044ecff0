"""`python -m workers.routing`."""

from shared.service import main
from workers.routing.route import Routing

if __name__ == "__main__":
    main(Routing)
