// Runs before the first paint, so that the page never flashes in another theme than the stored one.
try {
  const theme = localStorage.getItem("tolhouse-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  /* without storage, the theme of the system applies */
}
