const tip = document.getElementById("tip");
function show(mark, x, y) {
  tip.textContent = mark.dataset.tip;
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - width - 8)) + "px";
  tip.style.top = (y + height + 24 > innerHeight ? y - height - 12 : y + 14) + "px";
}
const hide = () => (tip.style.display = "none");
document.addEventListener("pointermove", (e) => {
  const mark = e.target.closest?.("[data-tip]");
  mark ? show(mark, e.clientX, e.clientY) : hide();
});
document.addEventListener("focusin", (e) => {
  const box = e.target.getBoundingClientRect();
  e.target.dataset?.tip ? show(e.target, box.right, box.bottom) : hide();
});
