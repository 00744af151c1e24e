// Appended to a copy of a report: measures the page as it is laid out and sends what it found to the page around it.
addEventListener("load", () => {
  const parse = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [light, dark] = [ink, background(element)].map((c) => luminance(c.slice(0, 3))).sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const seen = (box) => box.width > 0 && box.height > 0;
  const scrolls = (element) => element.closest(".scroll, pre, details:not([open])");
  const words = [...document.querySelectorAll("body *")].filter(
    (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && !e.closest("title, script, style"),
  );
  const visible = words.filter((e) => seen(e.getBoundingClientRect()));
  const pictures = [...document.querySelectorAll("svg.field, svg.heat, svg.bullet, .bar svg")];
  const lies = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const crossed = [];
  for (const picture of document.querySelectorAll("svg.field, svg.heat")) {
    const ticks = [...picture.querySelectorAll("text.tick")].map((t) => [t.textContent, t.getBoundingClientRect()]);
    ticks.forEach(([name, box], i) => {
      for (const [other, place] of ticks.slice(i + 1)) if (lies(box, place)) crossed.push(`${name} and ${other}`);
    });
  }
  const faint = visible.filter((e) => contrast(e) < 4.5);
  const beyond = visible.filter((e) => !scrolls(e) && e.getBoundingClientRect().right > innerWidth + 1);
  parent.postMessage(
    {
      name: document.documentElement.dataset.name,
      inner: innerWidth,
      whole: document.documentElement.scrollWidth,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      words: visible.length,
      faint: faint.map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}: ${contrast(e).toFixed(2)}`),
      beyond: beyond.map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}`),
      crossed,
      pictures: pictures.map((p) => {
        const box = p.getBoundingClientRect();
        const drawn = [...p.querySelectorAll("rect, circle, path, line.span, polyline, polygon")];
        const sized = drawn.filter((d) => {
          const own = d.getBoundingClientRect();
          return own.width > 0 || own.height > 0;
        });
        return { what: p.getAttribute("class") || "bar", width: box.width, height: box.height, drawn: sized.length };
      }),
      links: [...document.querySelectorAll("nav a")].every((a) => document.querySelector(a.getAttribute("href"))),
      owned: Boolean(window.owned),
    },
    "*",
  );
});
