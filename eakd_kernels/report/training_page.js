/* The page is whole without this: it shows the numbers of the last step. Here any step can be chosen. */
const { readings, places } = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("step");
const label = document.getElementById("label");
const cells = [...document.querySelectorAll("#reading tbody tr")].map((row) => [...row.querySelectorAll("td")]);
const lines = document.querySelectorAll(".reading");
const cursors = document.querySelectorAll(".cursor");

function read(step) {
  const { label: name, cells: numbers, lines: sentences } = readings[step];
  label.textContent = name;
  slider.value = step;
  slider.setAttribute("aria-valuetext", name);
  numbers.forEach((row, i) => row.forEach((text, j) => (cells[i][j].textContent = text)));
  lines.forEach((line, i) => (line.textContent = sentences[i]));
  for (const cursor of cursors) cursor.setAttribute("d", `M${places[step]},0V1000`);
}

const nearest = (place) =>
  places.reduce((best, other, i) => (Math.abs(other - place) < Math.abs(places[best] - place) ? i : best), 0);

for (const chart of document.querySelectorAll(".time svg")) {
  const choose = ({ clientX }) => {
    const { left, width } = chart.getBoundingClientRect();
    read(nearest((1000 * (clientX - left)) / width));
  };
  chart.addEventListener("pointermove", (event) => event.pointerType === "mouse" && choose(event));
  chart.addEventListener("click", choose);
}

slider.addEventListener("input", () => read(Number(slider.value)));
slider.parentElement.hidden = false;
read(Number(slider.value));
