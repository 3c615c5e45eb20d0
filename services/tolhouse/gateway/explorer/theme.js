// Runs before the first paint, so that a stored theme never flashes in the other one.
try {
  const theme = localStorage.getItem("tolhouse-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  /* storage is off: the system's theme applies */
}
