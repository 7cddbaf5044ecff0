"""`python -m ingress`: one ingress process."""

from ingress.app import Ingress
from shared import service

if __name__ == "__main__":
    service.main(Ingress)
