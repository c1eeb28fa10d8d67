"""What ``ssdtrain bench`` runs."""
