"""Input transforms on an undefended network: adaptive attacks beside what unaware ones would have claimed."""
